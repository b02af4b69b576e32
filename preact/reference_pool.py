"""The formulas of BN-ReLU in front of a pooling, in plain PyTorch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

NOWHERE = 255
"""The position of a maximum that is zero, and so has no gradient."""


def _activation(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """In the accumulation type: rounding before the maximum would make ties."""
    wide = input.to(reference.accumulate_dtype(input.dtype))
    return reference.batch_norm_relu(wide, mean, var, weight, bias, eps)


def batch_norm_relu_pool2d(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    average: bool,
) -> tuple[Tensor, Tensor]:
    """The maximum, or where ``average`` the mean, over windows of ``batch_norm_relu(input)``.

    Padding is for maxima alone. Beside the result ``[N, C, P, Q]``, rounded once, in the type and
    layout of ``input``, stands for each maximum its position in the window, row by row, as uint8:
    ``NOWHERE`` for one that is zero. For means that is empty.
    """
    activation = _activation(input, mean, var, weight, bias, eps)
    if average:
        output = F.avg_pool2d(activation, kernel, stride)
        empty = torch.empty(0, dtype=torch.uint8, device=input.device)
        return reference.preserve_layout(output.to(input.dtype), input), empty
    output, index = F.max_pool2d(activation, kernel, stride, padding, return_indices=True)
    row, column = index // input.size(3), index % input.size(3)
    tops = torch.arange(output.size(2), device=input.device) * stride[0] - padding[0]
    lefts = torch.arange(output.size(3), device=input.device) * stride[1] - padding[1]
    position = (row - tops[:, None]) * kernel[1] + column - lefts
    position = torch.where(output == 0, NOWHERE, position).to(torch.uint8)
    return (
        reference.preserve_layout(output.to(input.dtype), input),
        reference.preserve_layout(position, input),
    )


def batch_norm_relu_pool2d_backward(
    grad_output: Tensor,
    positions: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch_stats: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    average: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``input``, ``weight`` and ``bias``; ``positions`` are those of the forward.

    ``batch_stats`` says whether ``mean`` and ``var`` are the input's own.
    """
    wide = input.to(reference.accumulate_dtype(input.dtype))
    grad = grad_output.to(wide.dtype)
    if average:
        grad_activation = torch.ops.aten.avg_pool2d_backward.default(
            grad, wide, kernel, stride, [0, 0], False, True, None
        )
    else:
        # Row and column in the padded map, to which gradients are added one by one.
        height, width = (input.size(2 + i) + 2 * padding[i] for i in range(2))
        tops = torch.arange(grad.size(2), device=grad.device) * stride[0]
        lefts = torch.arange(grad.size(3), device=grad.device) * stride[1]
        there = positions != NOWHERE
        position = torch.where(there, positions, 0).to(torch.int64)
        index = (tops[:, None] + position // kernel[1]) * width + lefts + position % kernel[1]
        padded = grad.new_zeros(*grad.shape[:2], height * width)
        padded.scatter_add_(2, index.flatten(2), torch.where(there, grad, 0).flatten(2))
        grad_activation = padded.unflatten(2, (height, width))[
            :, :, padding[0] : height - padding[0], padding[1] : width - padding[1]
        ]
    vectors = (wide, mean, var, weight, bias)
    sums = reference.batch_norm_relu_backward_reduce(grad_activation, *vectors, eps)
    of_weight, of_bias = sums if batch_stats else (None, None)
    grad_input = reference.batch_norm_relu_backward_apply(
        grad_activation, *vectors, of_weight, of_bias, None, eps
    )
    return (reference.preserve_layout(grad_input.to(input.dtype), input), *sums)
