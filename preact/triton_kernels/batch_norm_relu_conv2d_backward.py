"""Both gradients of a convolution and its BN-ReLU: the kernels of each, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._prologue import lies_flat, sizes
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
    rest = (input, mean, var, weight, bias, eps, conv_weight, stride, padding, dilation, groups)
    pending = (pending_input, coefficients)
    formed = None
    if pending_input is not None:
        size = sizes(input, conv_weight, stride, padding, dilation, groups)
        if lies_flat(size, stride):
            formed = torch.empty_like(grad_output, memory_format=torch.channels_last)
    grad_z, sum_dz_x, sum_dz = batch_norm_relu_conv2d_backward_input(
        grad_output, *rest, *pending, grad_activation, formed
    )
    # Formed once, by the first kernel for the second: to form it for every tap there takes more
    # instructions than to multiply it, and reads a map more where this writes one.
    if formed is not None:
        grad_output, pending = formed, (None, None)
    grad_weight = batch_norm_relu_conv2d_backward_weight(grad_output, *rest, *pending)
    return grad_z, sum_dz_x, sum_dz, grad_weight
