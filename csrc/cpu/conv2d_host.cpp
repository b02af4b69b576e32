#include "cpu/conv2d_host.h"

namespace preact::cpu {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const ConvArguments& conv) {
  std::array<StableIValue, 9> stack{from(input),        from(weight),        from(bias),
                                    from(conv.stride),  from(conv.padding),  from(conv.dilation),
                                    from(false),        from(Pair{0, 0}),    from(conv.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& weight, const ConvArguments& conv) {
  constexpr std::array<bool, 3> mask{true, true, false};
  std::array<StableIValue, 11> stack{
      from(grad_output),   from(input), from(weight),     from(std::nullopt), from(conv.stride),
      from(conv.padding),  from(conv.dilation), from(false), from(Pair{0, 0}), from(conv.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace preact::cpu
