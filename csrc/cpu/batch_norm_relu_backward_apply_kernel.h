#include "cpu/batch_norm_relu_kernel.h"

// dx = scale * dz + (x - mean) * slope + offset (+ skip); slope and offset carry the two sums.
template <typename T, bool Sums, bool Skip>
struct BackwardApplyPass {
  using A = accumulate_t<T>;
  static constexpr int kMaps = Skip ? 4 : 3;
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
  template <typename P>
  PREACT_INLINE void element(const Regs<P>& regs, int64_t i) const {
    const auto centred = P::load(input + i) - regs.affine.mean;
    const auto dz = where_active(regs.affine.z(centred), P::load(grad_output + i));
    auto grad = regs.affine.scale * dz;
    if constexpr (Sums) grad = madd(regs.affine.scale, dz, madd(centred, regs.slope, regs.offset));
    if constexpr (Skip) grad += P::load(grad_skip + i);
    P::store(grad_input + i, grad);
  }
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>&, int64_t) const {}
};

template <typename T, bool Sums, bool Skip>
void backward_apply_part(const T* grad_output, const T* input, const T* grad_skip, T* grad_input,
                         const FeatureMap& map, const accumulate_t<T>* mean,
                         const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                         const accumulate_t<T>* slope, const accumulate_t<T>* offset, int64_t begin,
                         int64_t end) {
  using A = accumulate_t<T>;
  const BackwardApplyPass<T, Sums, Skip> pass{
      {mean, scale, bias}, slope, offset, grad_output, input, grad_skip, grad_input};
  sweep_map<A>(pass, map, begin, end);
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
