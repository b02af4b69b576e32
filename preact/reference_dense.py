"""The dense block's formulas: those of ``reference`` in the order in which a block runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference_units import NUMBERS, TENSORS, geometry_of


class _Half(NamedTuple):
    """A norm and its convolution; mean and var are None where they are the batch's own."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    conv: Tensor
    eps: float
    geometry: tuple[list[int], list[int], list[int], int]


def _halves(
    parameters: Sequence[Tensor | None], eps: Sequence[float], geometries: Sequence[int]
) -> list[_Half]:
    halves = []
    for index, one in enumerate(eps):
        mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
        assert conv is not None
        numbers = geometries[NUMBERS * index : NUMBERS * (index + 1)]
        halves.append(_Half(mean, var, weight, bias, conv, one, geometry_of(numbers)))
    return halves


def _map(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    size = (like.size(0), channels, *like.shape[2:])
    format = reference.memory_format_of(like)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=format)


def dense_block(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    geometries: Sequence[int],
    save: bool,
) -> list[Tensor]:
    """All features ``[N, C + growths, H, W]``, their mean and variance, mean and variance of each
    bottleneck in turn, and with ``save`` the bottlenecks.

    ``parameters`` and ``geometries`` are those of ``reference_units``, two of each a layer; mean
    and var are None where a norm takes the batch's own.
    """
    halves = _halves(parameters, eps, geometries)
    start, accumulate = input.size(1), reference.accumulate_dtype(input.dtype)
    features = _map(input, start + sum(half.conv.size(0) for half in halves[1::2]), input.dtype)
    features[:, :start] = input
    mean, var = (features.new_zeros(features.size(1), dtype=accumulate) for _ in range(2))
    if any(half.mean is None for half in halves[::2]):
        mean[:start], var[:start] = reference.batch_norm_stats(input)
    inner: list[Tensor] = []
    bottlenecks: list[Tensor] = []
    for norm, following in zip(halves[::2], halves[1::2], strict=True):
        bottleneck = _map(input, norm.conv.size(0), input.dtype)
        inner += reference.batch_norm_relu_conv2d_into(
            features[:, :start],
            mean[:start] if norm.mean is None else norm.mean,
            var[:start] if norm.var is None else norm.var,
            norm.weight, norm.bias, norm.eps, norm.conv, *norm.geometry, bottleneck,
        )  # fmt: skip
        growth = slice(start, start + following.conv.size(0))
        mean[growth], var[growth] = reference.batch_norm_relu_conv2d_into(
            bottleneck,
            inner[-2] if following.mean is None else following.mean,
            inner[-1] if following.var is None else following.var,
            following.weight, following.bias, following.eps, following.conv,
            *following.geometry, features[:, growth],
        )  # fmt: skip
        start = growth.stop
        bottlenecks += [bottleneck] if save else []
    return [features, mean, var, *inner, *bottlenecks]


def dense_block_backward(
    grad_output: Tensor,
    found: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    geometries: Sequence[int],
    needs_input: bool,
) -> list[Tensor]:
    """Gradient of the input, empty without ``needs_input``, then of each norm and its convolution
    those of weight, bias and the convolution's weight, in their types.

    ``found`` are the forward's results. In backward a layer adds ``scale * dz`` to the one gradient
    of the features; what batch statistics add to that is linear in the features, ``slope * (x -
    mean) + offset``, the mean being the same in every layer: the layers' coefficients are summed,
    and a feature's gradient is completed where it is read. Until then it is kept in the
    accumulation type: rounding each sum would lose a part of what is not yet centred.
    """
    halves = _halves(parameters, eps, geometries)
    features, mean, var, *rest = found
    inner, bottlenecks = rest[: len(eps)], rest[len(eps) :]
    gradients: list[Tensor] = []
    end = features.size(1)
    total = _map(features, end, mean.dtype).copy_(grad_output)
    deferred = torch.stack([torch.ones_like(mean), torch.zeros_like(mean), mean, mean * 0])
    for index in reversed(range(len(eps) // 2)):
        norm, following = halves[2 * index : 2 * index + 2]
        growth = slice(end - following.conv.size(0), end)
        end, bottleneck = growth.start, bottlenecks[index]
        inner_mean = inner[2 * index] if following.mean is None else following.mean
        inner_var = inner[2 * index + 1] if following.var is None else following.var
        prefix = (inner_mean, inner_var, following.weight, following.bias, following.eps)
        grad_z, *sums, grad_conv = reference.batch_norm_relu_conv2d_backward(
            total[:, growth], bottleneck, *prefix, following.conv, None,
            *following.geometry, features[:, growth], deferred[:, growth],
        )  # fmt: skip
        of_weight, of_bias = (sums[0], sums[1]) if following.mean is None else (None, None)
        coefficients = reference.batch_norm_backward_coefficients(
            bottleneck, inner_mean, inner_var, following.weight, of_weight, of_bias, following.eps
        )
        x = features[:, :end]
        its_mean = mean[:end] if norm.mean is None else norm.mean
        its_var = var[:end] if norm.var is None else norm.var
        *first_sums, grad_first = reference.batch_norm_relu_conv2d_backward_add(
            grad_z, x, its_mean, its_var, norm.weight, norm.bias, norm.eps,
            norm.conv, *norm.geometry, bottleneck, coefficients,
            total[:, :end], total[:, :end],
        )  # fmt: skip
        if norm.mean is None:
            rows = reference.batch_norm_backward_coefficients(
                x, its_mean, its_var, norm.weight, first_sums[0], first_sums[1], norm.eps
            )
            deferred[1::2, :end] += rows[1::2]
        both = ((norm, first_sums, grad_first), (following, sums, grad_conv))
        gradients[:0] = [
            gradient if like is None else gradient.to(like.dtype)
            for half, of_norm, of_conv in both
            for gradient, like in zip(
                (*of_norm, of_conv), (half.weight, half.bias, half.conv), strict=True
            )
        ]
    if not needs_input:
        return [features.new_empty(0, end, 1, 1), *gradients]
    x = features[:, :end]
    _, slope, centre, offset = (reference.per_channel(row, x) for row in deferred[:, :end])
    grad_input = total[:, :end] + (slope * (x - centre) + offset)
    return [reference.preserve_layout(grad_input.to(x.dtype), features), *gradients]
