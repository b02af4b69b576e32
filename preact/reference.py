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


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The library's convolution."""
    return torch.ops.aten.convolution.default(
        input, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )


def batch_norm_relu_conv2d(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``conv2d(relu(bn(input))) + conv_bias + residual`` and the statistics of that result.

    The padding is of zeros after batch norm and ReLU. The result ``[N, O, P, Q]`` has the type of
    ``conv_weight`` and the layout of ``input``; mean and variance ``[O]`` are those of the result
    as rounded to its type.
    """
    activation = batch_norm_relu(input, mean, var, weight, bias, eps).to(conv_weight.dtype)
    output = convolve(activation, conv_weight, conv_bias, stride, padding, dilation, groups)
    if residual is not None:
        output = output + residual
    output = preserve_layout(output, input)
    return (output, *batch_norm_stats(output))


def batch_norm_relu_conv2d_into(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    """``batch_norm_relu_conv2d`` written into ``output``; its mean and variance ``[O]``.

    ``input`` and ``output`` may be some channels of wider maps. ``conv_weight`` is rounded to the
    type of ``output``.
    """
    prefix = (input, mean, var, weight, bias, eps, conv_weight.to(output.dtype))
    found, *statistics = batch_norm_relu_conv2d(
        *prefix, None, None, stride, padding, dilation, groups
    )
    output.copy_(found)
    return statistics[0], statistics[1]


def batch_norm_backward_coefficients(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Rows ``scale, slope, centre, offset`` ``[4, C]`` of the batch norm's backward apply.

    ``dx = scale * dz + slope * (x - centre) + offset``, with ``dz`` the masked gradient. A consumer
    that has ``dz``, ``input`` and these forms ``dx`` itself, and ``dx`` need never be written.
    Without the two sums the statistics are constants: slope and offset are zero.
    """
    accumulate = accumulate_dtype(input.dtype)
    invstd = torch.rsqrt(var.to(accumulate) + eps)
    scale = invstd if weight is None else invstd * weight.to(accumulate)
    slope, offset = torch.zeros_like(scale), torch.zeros_like(scale)
    if grad_weight is not None and grad_bias is not None:
        count = input.numel() // input.size(1)
        slope = -scale * invstd * grad_weight.to(accumulate) / count
        offset = -scale * grad_bias.to(accumulate) / count
    return torch.stack([scale, slope, mean.to(accumulate), offset])


def formed_gradient(
    grad_output: Tensor, pending_input: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    """The gradient itself, formed first where it is pending."""
    if pending_input is None or coefficients is None:
        return grad_output
    scale, slope, centre, offset = (per_channel(row, grad_output) for row in coefficients)
    formed = scale * grad_output + (slope * (pending_input - centre) + offset)
    return formed.to(pending_input.dtype)


def batch_norm_relu_conv2d_backward_input(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pending_input: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_z, sum_dz_x, sum_dz)``: masked gradient before the ReLU, and its two sums ``[C]``.

    ``grad_z`` is like ``input``; the sums are of ``grad_z`` as rounded to its type. The gradient of
    ``input`` itself is ``batch_norm_relu_backward_apply`` of ``grad_z``, whose mask changes nothing
    there. Where ``pending_input`` and ``coefficients`` are given, ``grad_output`` is the masked
    gradient ``dz`` of the norm that follows, whose input (this convolution's result) is
    ``pending_input``, and its ``batch_norm_backward_coefficients`` complete it; it may then be of
    the accumulation type.
    """
    grad_output = formed_gradient(grad_output, pending_input, coefficients)
    grad_activation = torch.ops.aten.convolution_backward.default(
        grad_output, input.to(conv_weight.dtype), conv_weight, None, stride, padding, dilation,
        False, [0, 0], groups, [True, False, False],
    )[0]  # fmt: skip
    _, z, _ = _centred_and_z(input, mean, var, weight, bias, eps)
    grad_z = torch.where(z > 0, grad_activation.to(z.dtype), 0).to(input.dtype)
    grad_z = preserve_layout(grad_z, input)
    sums = batch_norm_relu_backward_reduce(grad_z, input, mean, var, weight, bias, eps)
    return (grad_z, *sums)


def batch_norm_relu_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pending_input: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Gradient of ``conv_weight``, like it; the activation is computed again from ``input``.

    ``grad_output`` may be pending, as in ``batch_norm_relu_conv2d_backward_input``.
    """
    activation = batch_norm_relu(input, mean, var, weight, bias, eps).to(conv_weight.dtype)
    gradient = torch.ops.aten.convolution_backward.default(
        formed_gradient(grad_output, pending_input, coefficients), activation, conv_weight, None,
        stride, padding, dilation, False, [0, 0], groups, [False, True, False],
    )[1]  # fmt: skip
    return preserve_layout(gradient, conv_weight)


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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pending_input: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_z, sum_dz_x, sum_dz, gradient of conv_weight)``: both gradients in one pass.

    ``grad_activation``, like ``input``, is what other users of the activation contribute to its
    gradient. ``grad_output`` may be pending, as in ``batch_norm_relu_conv2d_backward_input``.
    ``conv_weight`` may be wider than the convolution's result, as parameters are under autocast: it
    is rounded to that type, and its gradient is of its own.
    """
    grad_output = formed_gradient(grad_output, pending_input, coefficients)
    activation = batch_norm_relu(input, mean, var, weight, bias, eps).to(grad_output.dtype)
    used = conv_weight.to(grad_output.dtype)
    gradient, grad_conv_weight, _ = torch.ops.aten.convolution_backward.default(
        grad_output, activation, used, None, stride, padding, dilation, False, [0, 0],
        groups, [True, True, False],
    )  # fmt: skip
    if grad_activation is not None:
        gradient = gradient + grad_activation
    _, z, _ = _centred_and_z(input, mean, var, weight, bias, eps)
    grad_z = preserve_layout(torch.where(z > 0, gradient.to(z.dtype), 0).to(input.dtype), input)
    sums = batch_norm_relu_backward_reduce(grad_z, input, mean, var, weight, bias, eps)
    grad_conv_weight = preserve_layout(grad_conv_weight.to(conv_weight.dtype), conv_weight)
    return (grad_z, *sums, grad_conv_weight)


def batch_norm_relu_conv2d_backward_add(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pending_input: Tensor | None,
    coefficients: Tensor | None,
    grad_skip: Tensor,
    grad_input: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm_relu_conv2d_backward`` without ``grad_z``, which is added up instead.

    ``grad_input``, which may be ``grad_skip`` itself, becomes ``grad_skip + scale * grad_z``, with
    ``scale`` of ``batch_norm_backward_coefficients``; the rest of those is left to the caller. Both
    are of the accumulation type: a rounded sum would lose a part of each share, whose mean is not
    zero. All maps may be some channels of wider ones.
    """
    grad_z, *found = batch_norm_relu_conv2d_backward(
        grad_output, input, mean, var, weight, bias, eps, conv_weight, None, stride, padding,
        dilation, groups, pending_input, coefficients,
    )  # fmt: skip
    scale = batch_norm_backward_coefficients(input, mean, var, weight, None, None, eps)[0]
    grad_input.copy_(grad_skip + per_channel(scale, grad_z) * grad_z)
    return found[0], found[1], found[2]
