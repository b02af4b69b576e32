// Arguments of the fused convolution's ops: sizes, checks, and the way to the reference formulas.
#pragma once

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "common/conv2d_shape.h"
#include "common/tensors.h"

namespace preact {

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
  return {input.size(0),  input.size(1),   input.size(2),   input.size(3),    weight.size(0),
          outputs(0),     outputs(1),      weight.size(2),  weight.size(3),   conv.stride[0],
          conv.stride[1], conv.padding[0], conv.padding[1], conv.dilation[0], conv.dilation[1]};
}

// A result of `sizes` in the type and on the device of `like`, in a given layout.
inline Tensor empty_map(const std::array<int64_t, 4>& sizes, const Tensor& like,
                        MemoryFormat format) {
  return empty({sizes.data(), sizes.size()}, type_number(like), like, format);
}

inline void check_result_like(const Tensor& tensor, const Conv2dShape& shape, const Tensor& input,
                              const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == shape.batch && tensor.size(1) == shape.out_channels &&
          tensor.size(2) == shape.out_h && tensor.size(3) == shape.out_w &&
          tensor.scalar_type() == input.scalar_type() && tensor.device() == input.device(),
      name, " must have the shape, type and device of the convolution's result");
}

// A map in the shape of `like` and its accumulation type.
inline void check_accumulated(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim() && tensor.device() == like.device() &&
              tensor.scalar_type() == accumulate_type(like.scalar_type());
  for (int64_t dim = 0; same && dim < like.dim(); ++dim) {
    same = tensor.size(dim) == like.size(dim);
  }
  STD_TORCH_CHECK(same, name,
                  " must have the shape and accumulation type of the map it belongs to");
}

// What goes into the forward beside input and weight; the weight of a bfloat16 map may be float32.
inline void check_conv2d_forward(const Tensor& input, const Conv2dShape& shape,
                                 const OptionalTensor& conv_bias, const OptionalTensor& residual) {
  if (conv_bias) {
    STD_TORCH_CHECK(conv_bias->dim() == 1 && conv_bias->size(0) == shape.out_channels &&
                        conv_bias->scalar_type() == input.scalar_type() &&
                        conv_bias->device() == input.device(),
                    "conv_bias must have ", shape.out_channels, " elements in the type of input");
  }
  if (residual) check_result_like(*residual, shape, input, "residual");
}

// What goes into the backward beside input and weight; the weight of a bfloat16 map may be float32.
inline void check_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                  const Conv2dShape& shape, const OptionalTensor& grad_activation,
                                  const OptionalTensor& pending_input,
                                  const OptionalTensor& coefficients) {
  // What adds up in a wider type may be completed from that.
  const bool wide = pending_input && grad_output.scalar_type() != input.scalar_type() &&
                    grad_output.scalar_type() == accumulate_type(input.scalar_type());
  check_result_like(wide ? *pending_input : grad_output, shape, input, "grad_output");
  STD_TORCH_CHECK(pending_input.has_value() == coefficients.has_value(),
                  "pending_input and coefficients must be given together");
  if (grad_activation) check_like(*grad_activation, input, "grad_activation");
  if (pending_input) {
    if (wide) {
      check_accumulated(grad_output, *pending_input, "grad_output");
    } else {
      check_like(*pending_input, grad_output, "pending_input");
    }
    STD_TORCH_CHECK(coefficients->dim() == 2 && coefficients->size(0) == 4 &&
                        coefficients->size(1) == shape.out_channels &&
                        coefficients->scalar_type() == accumulate_type(input.scalar_type()) &&
                        coefficients->device() == input.device(),
                    "coefficients must be [4, O] in the accumulation type");
  }
}

// Runs the op's formulas in PyTorch's own operations, for what its kernel leaves; a tuple of its
// kResults results.
template <size_t kResults, typename... Arguments>
auto run_reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  PREACT_CHECK_CALL(torch_call_dispatcher(op, "reference", stack.data(), TORCH_ABI_VERSION));
  return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::make_tuple(torch::stable::detail::to<Tensor>(stack[kIndex])...);
  }(std::make_index_sequence<kResults>{});
}

}  // namespace preact
