// The convolutions by tiles as the ops of the fused convolution see them.
#pragma once

#include "cpu/conv2d_host.h"
#include "cpu/conv2d_tiles_layout.h"
#include "cpu/ops.h"

namespace preact::cpu {

// Whether the convolution by tiles takes these: as is_direct_slice, in bfloat16, where the
// processor multiplies that.
inline bool is_tiled_slice(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                           int64_t groups) {
  return input.scalar_type() == ScalarType::BFloat16 && capability() >= Capability::avx512_bf16 &&
         is_direct_slice(input, weight, shape, groups);
}

// As is_direct.
inline bool is_tiled(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                     int64_t groups) {
  return memory_format_of(input) == MemoryFormat::ChannelsLast &&
         is_tiled_slice(input, weight, shape, groups);
}

inline BFloat16* packed_scratch(int64_t size) {
  return reinterpret_cast<BFloat16*>(scratch(Slot::weights, (size + 1) / 2));
}

// Writes output and returns its mean and variance.
std::tuple<Tensor, Tensor> tiled_forward(const Tensor& input, const Affine<float>& affine,
                                         const Tensor& conv_weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, const Conv2dShape& shape,
                                         const Tensor& output);

// Where found.grad_z is undefined it is not kept. Where grad_skip is given, found.grad_z becomes
// the sum of it and of what grad_z contributes to the gradient of the input, both float. A pending
// grad_output may be float too.
void tiled_backward(const Tensor& grad_output, const Tensor& input, const Affine<float>& affine,
                    const Tensor& conv_weight, const OptionalTensor& grad_activation,
                    const OptionalTensor& grad_skip, const OptionalTensor& pending_input,
                    const OptionalTensor& coefficients, const std::optional<UnitAfter>& after,
                    const Conv2dShape& shape, const ConvGradients& found);

}  // namespace preact::cpu
