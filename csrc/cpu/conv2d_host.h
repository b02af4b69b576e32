// What the ops of the fused convolution share around their kernels.
#pragma once

#include <array>

#include "cpu/conv2d_direct.h"
#include "cpu/host.h"

namespace preact::cpu {

using Pair = std::vector<int64_t>;  // of a height and a width

// Arguments of the convolution, as the schemas of preact/ops.py have them.
struct ConvArguments {
  Pair stride, padding, dilation;
  int64_t groups;
};

// Checked sizes of a convolution of `input`.
inline Conv2dShape conv2d_shape(const Tensor& input, const Tensor& weight,
                                const ConvArguments& conv) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4,
                  "input must be [N, C, H, W] and conv_weight [O, C, KH, KW]");
  STD_TORCH_CHECK(conv.stride.size() == 2 && conv.padding.size() == 2 && conv.dilation.size() == 2,
                  "stride, padding and dilation must have two elements");
  STD_TORCH_CHECK(conv.groups > 0 && input.size(1) == weight.size(1) * conv.groups,
                  "conv_weight with groups=", conv.groups, " expects input to have ",
                  weight.size(1) * conv.groups, " channels, got ", input.size(1));
  const auto outputs = [&](int dim) {
    const int64_t reach = conv.dilation[dim] * (weight.size(dim + 2) - 1) + 1;
    STD_TORCH_CHECK(conv.stride[dim] > 0 && conv.dilation[dim] > 0 && conv.padding[dim] >= 0,
                    "stride and dilation must be positive, padding must not be negative");
    const int64_t room = input.size(dim + 2) + 2 * conv.padding[dim] - reach;
    STD_TORCH_CHECK(room >= 0, "conv_weight is larger than the padded input");
    return room / conv.stride[dim] + 1;
  };
  return {input.size(0),      input.size(1),      input.size(2),    input.size(3),
          weight.size(0),     outputs(0),         outputs(1),       weight.size(2),
          weight.size(3),     conv.stride[0],     conv.stride[1],   conv.padding[0],
          conv.padding[1],    conv.dilation[0],   conv.dilation[1]};
}

// Whether the direct convolution takes these: float32 in channels_last, no groups, a stride its
// tiles are compiled for. Everything else is composed of the streaming kernels and the library's.
inline bool is_direct(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                      int64_t groups) {
  return input.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
         groups == 1 && has_direct_stride(shape) && is_channels_last(input) && shape.batch > 0;
}

inline WeightStrides weight_strides(const Tensor& weight) {
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

inline DirectNorm direct_norm(const Affine<float>& affine) {
  return {affine.mean.data(), affine.scale.data(), affine.bias.data()};
}

inline const float* maybe_data(const OptionalTensor& tensor) {
  return tensor ? data<float>(*tensor) : nullptr;
}

// A result of `shape` in the type of `like` and a given layout.
inline Tensor empty_map(const std::array<int64_t, 4>& sizes, const Tensor& like,
                        MemoryFormat format) {
  return torch::stable::empty({sizes.data(), sizes.size()}, like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, format);
}

// The library's convolution.
Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const ConvArguments& conv);
// Its gradients of input and weight.
std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& weight, const ConvArguments& conv);

// The ops that others are composed of.
std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input);
Tensor batch_norm_relu(const Tensor& input, const Tensor& mean, const Tensor& var,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> identity_add(const Tensor& input, const Tensor& other);

}  // namespace preact::cpu
