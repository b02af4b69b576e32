// Per-channel values of y = relu((x - mean) * scale + bias).
template <typename A>
struct ChannelAffine {
  const A* mean;
  const A* scale;
  const A* bias;

  template <typename P>
  struct Regs {
    typename P::reg mean, scale, bias;

    // The forward's own arithmetic: the backward's mask comes from the same two operations.
    PREACT_INLINE typename P::reg z(typename P::reg centred) const {
      return madd(centred, scale, bias);
    }
  };
  template <typename P, typename Get>
  PREACT_INLINE Regs<P> get(int64_t c) const {
    return {Get::template get<P>(mean, c), Get::template get<P>(scale, c),
            Get::template get<P>(bias, c)};
  }
};

template <typename T>
struct ApplyPass {
  using A = accumulate_t<T>;
  static constexpr int kRows = 4;
  static constexpr bool kAgain = true;
  ChannelAffine<A> affine;
  const T* input;
  T* output;

  template <typename P, typename Get>
  PREACT_INLINE auto begin(int64_t c) const {
    return affine.template get<P, Get>(c);
  }
  template <typename P, typename Regs, typename At>
  PREACT_INLINE void element(const Regs& regs, At at) const {
    store_at<P>(output, at, relu(regs.z(load_at<P>(input, at) - regs.mean)));
  }
  template <typename Regs>
  PREACT_INLINE void join(Regs&, const Regs&) const {}
  template <typename P, typename Get, typename Regs>
  PREACT_INLINE void end(const Regs&, int64_t) const {}
};

template <typename T>
void batch_norm_relu_part(const T* input, T* output, const FeatureMap& map,
                          const accumulate_t<T>* mean, const accumulate_t<T>* scale,
                          const accumulate_t<T>* bias, int64_t begin, int64_t end) {
  const ChannelArrays<T, 3> of(map, {mean, scale, bias});
  sweep_map<T>(ApplyPass<T>{{of[0], of[1], of[2]}, input, output}, map, begin, end);
}
