#include "cpu/host.h"

namespace preact::cpu {

// Rows scale, slope, centre and offset of dx = scale * dz + slope * (x - centre) + offset: [4, C].
Tensor batch_norm_backward_coefficients(const Tensor& input, const Tensor& mean, const Tensor& var,
                                        const OptionalTensor& weight,
                                        const OptionalTensor& grad_weight,
                                        const OptionalTensor& grad_bias, double eps) {
  STD_TORCH_CHECK(grad_weight.has_value() == grad_bias.has_value(),
                  "grad_weight and grad_bias must be given together");
  STD_TORCH_CHECK(input.dim() >= 2, "input must have at least 2 dimensions");
  const int64_t channels = input.size(1), sizes[2] = {4, channels};
  const int64_t count = channels > 0 ? input.numel() / channels : 0;
  Tensor coefficients = empty({sizes, 2}, accumulate_type_number(input), input);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, std::nullopt, eps);
    const BackwardSums<A> sums(input, affine, grad_weight, grad_bias, count);
    A* const rows = mutable_data<A>(coefficients);
    for (int64_t c = 0; c < channels; ++c) {
      rows[c] = affine.scale[c];
      rows[channels + c] = sums.slope[c];
      rows[2 * channels + c] = affine.mean[c];
      rows[3 * channels + c] = sums.offset[c];
    }
  });
  return coefficients;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_backward_coefficients",
         TORCH_BOX(&preact::cpu::batch_norm_backward_coefficients));
}
