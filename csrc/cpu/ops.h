// Ops of this backend that other ops are made of.
#pragma once

#include <tuple>

#include "common/conv2d_arguments.h"

namespace preact::cpu {

// batch_norm_relu_backward_apply on maps of one layout, written to grad_input, which may be
// grad_output itself.
void write_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                          const Tensor& var, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& grad_weight,
                          const OptionalTensor& grad_bias, const OptionalTensor& grad_skip,
                          double eps, const Tensor& grad_input);

Tensor batch_norm_backward_coefficients(const Tensor& input, const Tensor& mean, const Tensor& var,
                                        const OptionalTensor& weight,
                                        const OptionalTensor& grad_weight,
                                        const OptionalTensor& grad_bias, double eps);

// Here the result has the type of input, to which conv_weight is rounded where it is wider; as an
// op of its own this computes in the type of conv_weight.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& conv_bias, const OptionalTensor& residual, Pair stride, Pair padding,
    Pair dilation, int64_t groups);

// What the last convolution of a unit takes from the unit after it, whose first norm's backward is
// pending: to the gradient that gives is added what came over the shortcut.
struct UnitAfter {
  Tensor grad_skip, completed;  // the sum is written to completed, which may be grad_skip

  // That unit's first convolution, of the result of this one, and what its backward took, where the
  // gradient of its input was not kept and grad_output is not read. Without a bias its norm has
  // none.
  struct Again {
    Tensor grad_output, pending_input, coefficients, conv_weight;
    OptionalTensor bias;
  };
  std::optional<Again> again;
};

// Whether the gradient that a convolution's backward takes may be completed on the way, and
// whether the gradient of the first convolution's input is worth computing twice for that.
bool completes_gradient(const Tensor& input, const Tensor& conv_weight, const ConvArguments& conv);
bool computes_again(const Tensor& input, const Tensor& conv_weight, const ConvArguments& conv);

// grad_z is undefined where it is not kept.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& grad_activation, Pair stride, Pair padding, Pair dilation, int64_t groups,
    const OptionalTensor& pending_input, const OptionalTensor& coefficients,
    const std::optional<UnitAfter>& after = std::nullopt, bool keeps_grad_z = true);

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input);

std::tuple<Tensor, Tensor> batch_norm_relu_conv2d_into(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight, Pair stride, Pair padding,
    Pair dilation, int64_t groups, Tensor output);

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward_add(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    Pair stride, Pair padding, Pair dilation, int64_t groups, const OptionalTensor& pending_input,
    const OptionalTensor& coefficients, const Tensor& grad_skip, Tensor grad_input);

}  // namespace preact::cpu
