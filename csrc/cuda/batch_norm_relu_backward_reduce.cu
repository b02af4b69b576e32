#include "cuda/batch_norm_relu_backward_reduce.cuh"

#include "cuda/host.h"

namespace preact::cuda {

// The gradients of weight and bias, [C] each: sums of dz * xhat and of dz.
std::tuple<Tensor, Tensor> batch_norm_relu_backward_reduce_op(
    const Tensor& grad_output_, const Tensor& input_, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check_like(grad_output_, input_, "grad_output");
  const MemoryFormat format = memory_format_of(input_);
  const FeatureMap map = feature_map(input_, format);
  Call call(input_);
  const Tensor input = dense(input_, format), grad_output = dense(grad_output_, format);
  const NormVectors norm(input, mean, var, weight, bias, eps);
  Tensor grad_weight = empty_vector(input), grad_bias = empty_vector(input);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T *grad = data<T>(grad_output), *x = data<T>(input);
    const int64_t partials = batch_norm_relu_backward_reduce_partials(grad, x, map);
    batch_norm_relu_backward_reduce(grad, x, norm.get<A>(), map, call.workspace<TwoSums>(partials),
                                    mutable_data<A>(grad_weight), mutable_data<A>(grad_bias),
                                    call.stream());
  });
  return {grad_weight, grad_bias};
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_relu_backward_reduce",
         TORCH_BOX(&preact::cuda::batch_norm_relu_backward_reduce_op));
}
