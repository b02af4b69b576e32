#define PREACT_KERNELS "cpu/batch_norm_relu_backward_apply_kernel.h"
#include "common/backward_terms.h"
#include "cpu/foreach_capability.h"
#include "cpu/host.h"

namespace preact::cpu {

// Gradient of input, plus grad_skip. grad_weight and grad_bias are the reduce op's sums where mean
// and var belong to the batch, absent where they are constants.
Tensor batch_norm_relu_backward_apply(const Tensor& grad_output_, const Tensor& input_,
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
  const Tensor input = dense(input_, format), grad_output = dense(grad_output_, format);
  const OptionalTensor skip = grad_skip ? OptionalTensor(dense(*grad_skip, format)) : std::nullopt;
  const FeatureMap map = feature_map(input, format);
  Tensor grad_input = empty_like(input, format);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, bias, eps);
    std::vector<A> slope, offset;
    if (grad_weight) {
      const Tensor sum_dz_x = channel_vector(*grad_weight, input, "grad_weight");
      const Tensor sum_dz = channel_vector(*grad_bias, input, "grad_bias");
      const A inverse = A(1) / static_cast<A>(map.count());
      for (int64_t c = 0; c < map.channels; ++c) {
        const BackwardTerms<A> terms(affine.scale[c], affine.invstd[c], data<A>(sum_dz_x)[c],
                                     data<A>(sum_dz)[c], inverse);
        slope.push_back(terms.slope);
        offset.push_back(terms.offset);
      }
    }
    const auto part = PREACT_SELECT(batch_norm_relu_backward_apply_part, T);
    parallel_over_map(map, [&](int64_t begin, int64_t end) {
      part(data<T>(grad_output), data<T>(input), skip ? data<T>(*skip) : nullptr,
           mutable_data<T>(grad_input), map, affine.mean.data(), affine.scale.data(),
           affine.bias.data(), grad_weight ? slope.data() : nullptr, offset.data(), begin, end);
    });
  });
  return grad_input;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_backward_apply",
         TORCH_BOX(&preact::cpu::batch_norm_relu_backward_apply));
}
