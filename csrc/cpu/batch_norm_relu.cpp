#define PREACT_KERNELS "cpu/batch_norm_relu_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"

namespace preact::cpu {

// relu((input - mean) / sqrt(var + eps) * weight + bias), in the shape, type and layout of input.
Tensor batch_norm_relu(const Tensor& input_, const Tensor& mean, const Tensor& var,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const MemoryFormat format = memory_format_of(input_);
  const Tensor input = dense(input_, format);
  const FeatureMap map = feature_map(input, format);
  Tensor output = empty_like(input, format);
  dispatch(input.scalar_type(), [&]<typename T>() {
    const Affine<accumulate_t<T>> affine(input, mean, var, weight, bias, eps);
    const auto part = PREACT_SELECT(batch_norm_relu_part, T);
    parallel_over_map(
        map, [=, x = data<T>(input), y = mutable_data<T>(output), mean = affine.mean.data(),
              scale = affine.scale.data(), bias = affine.bias.data()](int64_t begin, int64_t end) {
          part(x, y, map, mean, scale, bias, begin, end);
        });
  });
  return output;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&preact::cpu::batch_norm_relu));
}
