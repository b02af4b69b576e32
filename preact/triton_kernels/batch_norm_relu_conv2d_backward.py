"""Both gradients of a convolution and its BN-ReLU: the kernels of each, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .batch_norm_relu_conv2d_backward_input import batch_norm_relu_conv2d_backward_input
from .batch_norm_relu_conv2d_backward_weight import batch_norm_relu_conv2d_backward_weight


def batch_norm_relu_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    grad_activation: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pending_input: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shared = (
        grad_output, input, mean, var, weight, bias, eps, conv_weight, stride, padding, dilation,
        groups, pending_input, coefficients,
    )  # fmt: skip
    grad_z, sum_dz_x, sum_dz = batch_norm_relu_conv2d_backward_input(*shared, grad_activation)
    return grad_z, sum_dz_x, sum_dz, batch_norm_relu_conv2d_backward_weight(*shared)
