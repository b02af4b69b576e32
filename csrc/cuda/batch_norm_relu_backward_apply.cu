#include "cuda/batch_norm_relu_backward_apply.cuh"

#include "cuda/host.h"

namespace preact::cuda {

// Gradient of input, plus grad_skip. grad_weight and grad_bias are the reduce op's sums where mean
// and var belong to the batch, absent where they are constants.
Tensor batch_norm_relu_backward_apply_op(const Tensor& grad_output_, const Tensor& input_,
                                         const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& grad_weight,
                                         const OptionalTensor& grad_bias,
                                         const OptionalTensor& grad_skip, double eps) {
  check_like(grad_output_, input_, "grad_output");
  if (grad_skip) check_like(*grad_skip, input_, "grad_skip");
  STD_TORCH_CHECK(grad_weight.has_value() == grad_bias.has_value(),
                  "grad_weight and grad_bias must be given together");
  const MemoryFormat format = memory_format_of(input_);
  const FeatureMap map = feature_map(input_, format);
  Call call(input_);
  const Tensor input = dense(input_, format), grad_output = dense(grad_output_, format);
  const OptionalTensor skip = dense(grad_skip, format);
  const NormVectors norm(input, mean, var, weight, bias, eps);
  const OptionalTensor sum_dz_x = NormVectors::optional_vector(grad_weight, input, "grad_weight");
  const OptionalTensor sum_dz = NormVectors::optional_vector(grad_bias, input, "grad_bias");
  Tensor grad_input = empty_like(input, format);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    batch_norm_relu_backward_apply(data<T>(grad_output), data<T>(input), data<T>(skip),
                                   norm.get<A>(), data<A>(sum_dz_x), data<A>(sum_dz),
                                   mutable_data<T>(grad_input), map, call.stream());
  });
  return grad_input;
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_relu_backward_apply",
         TORCH_BOX(&preact::cuda::batch_norm_relu_backward_apply_op));
}
