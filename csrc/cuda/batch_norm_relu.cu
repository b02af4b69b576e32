#include "cuda/batch_norm_relu.cuh"

#include "cuda/host.h"

namespace preact::cuda {

// relu((input - mean) / sqrt(var + eps) * weight + bias), in the shape, type and layout of input.
Tensor batch_norm_relu_op(const Tensor& input_, const Tensor& mean, const Tensor& var,
                          const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const MemoryFormat format = memory_format_of(input_);
  const FeatureMap map = feature_map(input_, format);
  Call call(input_);
  const Tensor input = dense(input_, format);
  const NormVectors norm(input, mean, var, weight, bias, eps);
  Tensor output = empty_like(input, format);
  dispatch(input.scalar_type(), [&]<typename T>() {
    batch_norm_relu(data<T>(input), norm.get<accumulate_t<T>>(), mutable_data<T>(output), map,
                    call.stream());
  });
  return output;
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&preact::cuda::batch_norm_relu_op));
}
