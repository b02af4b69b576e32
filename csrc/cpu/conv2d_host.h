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
// tiles are compiled for. Everything else runs as the reference does.
inline bool is_direct(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                      int64_t groups) {
  return input.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
         groups == 1 && has_direct_stride(shape) && shape.batch > 0 &&
         memory_format_of(input) == MemoryFormat::ChannelsLast;
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

inline OptionalTensor dense(const OptionalTensor& tensor, MemoryFormat format) {
  return tensor ? OptionalTensor(preact::dense(*tensor, format)) : std::nullopt;
}

inline void check_result_like(const Tensor& tensor, const Conv2dShape& shape, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == shape.batch &&
                      tensor.size(1) == shape.out_channels && tensor.size(2) == shape.out_h &&
                      tensor.size(3) == shape.out_w && tensor.scalar_type() == ScalarType::Float,
                  name, " must have the shape and type of the convolution's result");
}

// Runs the op's formulas in PyTorch's own operations, for what the direct convolution leaves.
template <typename... Arguments>
auto run_reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{
      torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, "reference", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace preact::cpu
