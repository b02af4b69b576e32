// The gradient of a block's input: what the layers added up and what their batch statistics add to
// that, slope * (x - centre) + offset.
template <typename T>
struct CompletePass {
  using A = accumulate_t<T>;
  static constexpr int kRows = 4;
  static constexpr bool kAgain = false;
  const A *slope, *centre, *offset;
  const A* total;
  const T* input;
  T* grad_input;

  template <typename P>
  struct Regs {
    typename P::reg slope, centre, offset;
  };
  template <typename P, typename Get>
  PREACT_INLINE Regs<P> begin(int64_t c) const {
    return {Get::template get<P>(slope, c), Get::template get<P>(centre, c),
            Get::template get<P>(offset, c)};
  }
  template <typename P, typename At>
  PREACT_INLINE void element(const Regs<P>& regs, At at) const {
    const auto centred = load_at<P>(input, at) - regs.centre;
    store_at<P>(grad_input, at, load_at<P>(total, at) + madd(regs.slope, centred, regs.offset));
  }
  template <typename Regs>
  PREACT_INLINE void join(Regs&, const Regs&) const {}
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>&, int64_t) const {}
};

// Pixels [begin, end), or where not channels_last planes, of `map`, the first channels of maps that
// have `wide` of them. coefficients is [4][channels].
template <typename T>
void complete_gradient_part(const accumulate_t<T>* total, const T* input,
                            const accumulate_t<T>* coefficients, T* grad_input,
                            const FeatureMap& map, int64_t wide, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = map.channels_last ? 0 : i % map.channels;
    const int64_t from = map.channels_last ? i * wide : (i / map.channels * wide + c) * map.spatial;
    const A* const rows = coefficients + c;
    const CompletePass<T> pass{rows + map.channels,
                               rows + 2 * map.channels,
                               rows + 3 * map.channels,
                               total + from,
                               input + from,
                               grad_input + i * (map.channels_last ? map.channels : map.spatial)};
    if (map.channels_last) {
      sweep_rows<A>(pass, 0, 1, map.channels, 0);
    } else {
      sweep_plane<A>(pass, 0, map.spatial, 0);
    }
  }
}
