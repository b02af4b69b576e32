"""Ground truth: the forward and the hand-derived backward in plain PyTorch operations.

Every other implementation is compared with these functions, and they run wherever no kernel does.
With ``n`` values per channel, ``xhat = (x - mean) * invstd`` and ``z = xhat * weight + bias``, the
unit's activation is ``relu(z)`` and its gradients follow Ioffe & Szegedy 2015 with the ReLU mask:

    dz       = grad_output where z > 0, else 0
    sum_dz   = sum(dz)               (the gradient of ``bias``)
    sum_dz_x = sum(dz * xhat)        (the gradient of ``weight``)
    dx       = weight * invstd * (dz - sum_dz / n - xhat * sum_dz_x / n)

This module imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of statistics, sums and per-channel vectors for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced_dims(input: Tensor) -> list[int]:
    """Every dimension but the channels."""
    return [dim for dim in range(input.dim()) if dim != 1]


def per_channel(vector: Tensor, input: Tensor) -> Tensor:
    """``[C]`` viewed as ``[1, C, 1, …]`` against ``input`` of shape ``[N, C, …]``."""
    return vector.view([1, -1] + [1] * (input.dim() - 2))


def preserve_layout(output: Tensor, like: Tensor) -> Tensor:
    """``output`` in the memory format a kernel would have written: dense, as ``like`` suggests."""
    return output.contiguous(memory_format=memory_format_of(like))


def memory_format_of(input: Tensor) -> torch.memory_format:
    """The dense layout a result takes from ``input``: channels_last only where it is that alone."""
    if (
        input.dim() == 4
        and not input.is_contiguous()
        and input.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def _centred_and_z(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x - mean``, ``z`` and the scale ``weight * invstd``, all in the accumulation type."""
    accumulate = accumulate_dtype(input.dtype)
    scale = torch.rsqrt(var.to(accumulate) + eps)
    if weight is not None:
        scale = scale * weight.to(accumulate)
    centred = input.to(accumulate) - per_channel(mean.to(accumulate), input)
    z = centred * per_channel(scale, input)
    if bias is not None:
        z = z + per_channel(bias.to(accumulate), input)
    return centred, z, scale


def batch_norm_stats(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the channels: two vectors ``[C]``."""
    values = input.to(accumulate_dtype(input.dtype))
    var, mean = torch.var_mean(values, dim=reduced_dims(input), correction=0)
    return mean, var


def batch_norm_relu(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``relu((input - mean) / sqrt(var + eps) * weight + bias)`` in the type of ``input``."""
    _, z, _ = _centred_and_z(input, mean, var, weight, bias, eps)
    return preserve_layout(z.relu().to(input.dtype), input)


def identity_add(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``input + other`` and the statistics of that (rounded) sum: ``[N, C, …], [C], [C]``."""
    output = preserve_layout(input + other, input)
    mean, var = batch_norm_stats(output)
    return output, mean, var


def batch_norm_relu_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(sum_dz_x, sum_dz)``, the gradients of ``weight`` and ``bias``, each ``[C]``."""
    centred, z, _ = _centred_and_z(input, mean, var, weight, bias, eps)
    grad_z = torch.where(z > 0, grad_output.to(z.dtype), 0)
    dims = reduced_dims(input)
    invstd = torch.rsqrt(var.to(z.dtype) + eps)
    return (grad_z * centred).sum(dims) * invstd, grad_z.sum(dims)


def batch_norm_relu_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_skip: Tensor | None,
    eps: float,
) -> Tensor:
    """Gradient of ``input``, plus ``grad_skip`` in the same pass.

    The two sums are given where ``mean`` and ``var`` are the batch's own; without them the
    statistics are constants, as in evaluation, and ``dx = dz * weight * invstd``.
    """
    centred, z, scale = _centred_and_z(input, mean, var, weight, bias, eps)
    grad_z = torch.where(z > 0, grad_output.to(z.dtype), 0)
    if grad_weight is not None and grad_bias is not None:
        count = input.numel() // input.size(1)
        invstd = torch.rsqrt(var.to(z.dtype) + eps)
        grad_z = grad_z - per_channel(grad_bias.to(z.dtype) / count, input)
        grad_z = grad_z - centred * per_channel(invstd * grad_weight.to(z.dtype) / count, input)
    grad_input = grad_z * per_channel(scale, input)
    if grad_skip is not None:
        grad_input = grad_input + grad_skip.to(z.dtype)
    return preserve_layout(grad_input.to(input.dtype), input)


def conv2d_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    """Gradient ``[O, C, KH, KW]`` of a convolution's weight, without groups, channels_last."""
    weight = input.new_empty(grad_output.size(1), input.size(1), kernel_h, kernel_w)
    gradient = torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, None, [stride_h, stride_w], [padding_h, padding_w],
        [dilation_h, dilation_w], False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    return gradient.contiguous(memory_format=torch.channels_last)
