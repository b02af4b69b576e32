#include "cpu/batch_norm_relu_kernel.h"

// dx = scale * dz + (x - mean) * slope + offset (+ skip); slope and offset carry the two sums.
template <typename T, bool Sums, bool Skip>
struct BackwardApplyPass {
  using A = accumulate_t<T>;
  static constexpr int kRows = 4;
  static constexpr bool kAgain = false;  // grad_input may be grad_output
  ChannelAffine<A> affine;
  const A* slope;
  const A* offset;
  const T* grad_output;
  const T* input;
  const T* grad_skip;
  T* grad_input;

  template <typename P>
  struct Regs {
    typename ChannelAffine<A>::template Regs<P> affine;
    typename P::reg slope, offset;
  };
  template <typename P, typename Get>
  PREACT_INLINE Regs<P> begin(int64_t c) const {
    Regs<P> regs{affine.template get<P, Get>(c), P::broadcast(0), P::broadcast(0)};
    if constexpr (Sums) {
      regs.slope = Get::template get<P>(slope, c);
      regs.offset = Get::template get<P>(offset, c);
    }
    return regs;
  }
  template <typename P, typename At>
  PREACT_INLINE void element(const Regs<P>& regs, At at) const {
    const auto centred = load_at<P>(input, at) - regs.affine.mean;
    const auto dz = where_active(regs.affine.z(centred), load_at<P>(grad_output, at));
    auto grad = regs.affine.scale * dz;
    if constexpr (Sums) grad = madd(regs.affine.scale, dz, madd(centred, regs.slope, regs.offset));
    if constexpr (Skip) grad += load_at<P>(grad_skip, at);
    store_at<P>(grad_input, at, grad);
  }
  template <typename Regs>
  PREACT_INLINE void join(Regs&, const Regs&) const {}
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>&, int64_t) const {}
};

template <typename T, bool Sums, bool Skip>
void backward_apply_part(const T* grad_output, const T* input, const T* grad_skip, T* grad_input,
                         const FeatureMap& map, const accumulate_t<T>* mean,
                         const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                         const accumulate_t<T>* slope, const accumulate_t<T>* offset, int64_t begin,
                         int64_t end) {
  const ChannelArrays<T, 5> of(map, {mean, scale, bias, slope, offset});
  const BackwardApplyPass<T, Sums, Skip> pass{
      {of[0], of[1], of[2]}, of[3], of[4], grad_output, input, grad_skip, grad_input};
  sweep_map<T>(pass, map, begin, end);
}

// slope null: the statistics are constants. grad_skip null: nothing to add.
template <typename T>
void batch_norm_relu_backward_apply_part(const T* grad_output, const T* input, const T* grad_skip,
                                         T* grad_input, const FeatureMap& map,
                                         const accumulate_t<T>* mean, const accumulate_t<T>* scale,
                                         const accumulate_t<T>* bias, const accumulate_t<T>* slope,
                                         const accumulate_t<T>* offset, int64_t begin,
                                         int64_t end) {
  const auto part = slope != nullptr
                        ? (grad_skip != nullptr ? &backward_apply_part<T, true, true>
                                                : &backward_apply_part<T, true, false>)
                        : (grad_skip != nullptr ? &backward_apply_part<T, false, true>
                                                : &backward_apply_part<T, false, false>);
  part(grad_output, input, grad_skip, grad_input, map, mean, scale, bias, slope, offset, begin,
       end);
}
