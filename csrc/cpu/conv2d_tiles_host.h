// The bfloat16 convolutions' side of the ops of the fused convolution.
#pragma once

#include "cpu/conv2d_bfloat16.h"
#include "cpu/conv2d_host.h"
#include "cpu/ops.h"

namespace preact::cpu {

// Whether the convolution by tiles takes these: as is_direct_slice, in bfloat16; the
// weight may be float, as parameters are under autocast, and its gradient then is.
inline bool is_tiled_slice(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                           int64_t groups) {
  return input.scalar_type() == ScalarType::BFloat16 &&
         (weight.scalar_type() == ScalarType::BFloat16 ||
          weight.scalar_type() == ScalarType::Float) &&
         groups == 1 && has_direct_stride(shape) && shape.batch > 0 && pixel_stride(input) > 0 &&
         capability() >= Capability::avx512_bf16;
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

// Calls function with a value of the type of the weight's elements.
template <typename Function>
void with_weight_type(const Tensor& weight, Function function) {
  if (weight.scalar_type() == ScalarType::Float) {
    function(float{});
  } else {
    function(BFloat16{});
  }
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
