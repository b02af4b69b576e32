"""The pieces every Function is made of: one BN-ReLU feeding convolutions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import cpp

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""


class Affine(NamedTuple):
    """What normalises one input: statistics ``[C]``, parameters ``[C]``, eps, whose statistics."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch_stats: bool


def activate(table: Any, input: Tensor, norm: Affine, dtype: torch.dtype) -> Tensor:
    activation = table.batch_norm_relu(input, norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
    return activation if activation.dtype == dtype else activation.to(dtype)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution.default(
        input, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )


def convolve_backward(
    table: Any,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, those that ``mask`` asks for."""
    stride, padding, dilation, groups = geometry
    wants_input, wants_weight, wants_bias = mask
    grad_weight: Tensor | None = None
    if (
        wants_weight
        and not wants_bias
        and cpp.prefers_weight_gradient(grad_output, input, weight, groups)
    ):
        kernel = (weight.size(2), weight.size(3))
        grad_weight = table.conv2d_weight_gradient(
            grad_output, input, *kernel, *stride, *padding, *dilation
        )
        if not wants_input:
            return None, grad_weight, None
    found = torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, [weight.size(0)] if wants_bias else None, stride, padding,
        dilation, False, [0, 0], groups,
        [wants_input, wants_weight and grad_weight is None, wants_bias],
    )  # fmt: skip
    return found[0], found[1] if grad_weight is None else grad_weight, found[2]


def cast_like(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in the type of what it belongs to."""
    if gradient is None or like is None or gradient.dtype == like.dtype:
        return gradient
    return gradient.to(like.dtype)


class Needs(NamedTuple):
    """Which gradients one prefix has to give."""

    input: bool
    norm: bool
    convs: list[tuple[bool, bool]]  # weight, bias


class PrefixGradients(NamedTuple):
    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    convs: list[tuple[Tensor | None, Tensor | None]]


def prefix_backward(
    table: Any,
    input: Tensor,
    norm: Affine,
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
    grad_outputs: Sequence[Tensor | None],
    activation: Tensor | None,
    grad_skip: Tensor | None,
    needs: Needs,
) -> PrefixGradients:
    """Backward of one BN-ReLU feeding ``weights``; ``grad_skip`` joins the gradient of ``input``.

    Each convolution gives its gradients in one call: a second call costs the library's set-up and
    its reorders again, more than the pass that computing activation and sums together would save.
    """
    vectors = (norm.mean, norm.var, norm.weight, norm.bias)
    reduce = needs.norm or (needs.input and norm.batch_stats)
    wants_input = reduce or needs.input
    if activation is None and any(weight for weight, _ in needs.convs):
        activation = activate(table, input, norm, weights[0].dtype)
    # Where no weight needs a gradient the convolution reads only the shape of its input.
    source = input if activation is None else activation

    grad_activation: Tensor | None = None
    convs: list[tuple[Tensor | None, Tensor | None]] = []
    for weight, geometry, grad, (wants_weight, wants_bias) in zip(
        weights, geometries, grad_outputs, needs.convs, strict=True
    ):
        part: Tensor | None = None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        if grad is not None and (wants_input or wants_weight or wants_bias):
            part, of_weight, of_bias = convolve_backward(
                table,
                grad,
                source if source.dtype == weight.dtype else source.to(weight.dtype),
                weight,
                geometry,
                [wants_input, wants_weight, wants_bias],
            )
        convs.append((of_weight, of_bias))
        if part is not None:
            grad_activation = part if grad_activation is None else grad_activation + part
    grad_activation = cast_like(grad_activation, input)

    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if grad_activation is not None and reduce:
        grad_weight, grad_bias = table.batch_norm_relu_backward_reduce(
            grad_activation, input, *vectors, norm.eps
        )

    grad_input = grad_skip if needs.input else None
    if grad_activation is not None and needs.input:
        sums = (grad_weight, grad_bias) if norm.batch_stats else (None, None)
        grad_input = table.batch_norm_relu_backward_apply(
            grad_activation, input, *vectors, *sums, cast_like(grad_skip, input), norm.eps
        )
    return PrefixGradients(grad_input, grad_weight, grad_bias, convs)


def eager_prefix(
    input: Tensor, norm: Affine, convs: Sequence[tuple[Tensor, Tensor | None, Geometry]]
) -> list[Tensor]:
    """The prefix in operations autograd differentiates any number of times."""
    mean, var = (None, None) if norm.batch_stats else (norm.mean, norm.var)
    activation = F.relu(
        F.batch_norm(
            input, mean, var, norm.weight, norm.bias, training=norm.batch_stats, eps=norm.eps
        )
    )
    return [
        convolve(activation.to(weight.dtype), weight, bias, geometry)
        for weight, bias, geometry in convs
    ] or [activation]


def differentiable_backward(
    forward: Callable[[], Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``forward()`` for ``inputs`` that carry a graph of their own."""
    with torch.enable_grad():
        pairs = [
            (output, grad)
            for output, grad in zip(forward(), grad_outputs, strict=True)
            if grad is not None
        ]
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
    gradients = iter(found)
    return [
        next(gradients) if tensor is not None and tensor.requires_grad else None
        for tensor in inputs
    ]
