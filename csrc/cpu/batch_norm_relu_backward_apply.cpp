#define PREACT_KERNELS "cpu/batch_norm_relu_backward_apply_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"
#include "cpu/ops.h"

namespace preact::cpu {

void write_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                          const Tensor& var, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& grad_weight,
                          const OptionalTensor& grad_bias, const OptionalTensor& grad_skip,
                          double eps, const Tensor& grad_input) {
  const FeatureMap map = feature_map(input, memory_format_of(input));
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, bias, eps);
    const BackwardSums<A> sums(input, affine, grad_weight, grad_bias, map.count());
    const auto part = PREACT_SELECT(batch_norm_relu_backward_apply_part, T);
    parallel_over_map(
        map, [=, g = data<T>(grad_output), x = data<T>(input),
              skip = grad_skip ? data<T>(*grad_skip) : nullptr, dx = mutable_data<T>(grad_input),
              mean = affine.mean.data(), scale = affine.scale.data(), bias = affine.bias.data(),
              slope = grad_weight ? sums.slope.data() : nullptr,
              offset = sums.offset.data()](int64_t begin, int64_t end) {
          part(g, x, skip, dx, map, mean, scale, bias, slope, offset, begin, end);
        });
  });
}

// Gradient of input, plus grad_skip. grad_weight and grad_bias are the reduce op's sums where mean
// and var belong to the batch, absent where they are constants.
Tensor batch_norm_relu_backward_apply(const Tensor& grad_output, const Tensor& input_,
                                      const Tensor& mean, const Tensor& var,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& grad_weight,
                                      const OptionalTensor& grad_bias,
                                      const OptionalTensor& grad_skip, double eps) {
  check_like(grad_output, input_, "grad_output");
  if (grad_skip) check_like(*grad_skip, input_, "grad_skip");
  STD_TORCH_CHECK(grad_weight.has_value() == grad_bias.has_value(),
                  "grad_weight and grad_bias must be given together");
  const MemoryFormat format = memory_format_of(input_);
  const Tensor input = dense(input_, format);
  const Tensor grad_input = empty_like(input, format);
  write_backward_apply(dense(grad_output, format), input, mean, var, weight, bias, grad_weight,
                       grad_bias, dense(grad_skip, format), eps, grad_input);
  return grad_input;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_backward_apply", TORCH_BOX(&preact::cpu::batch_norm_relu_backward_apply));
}
