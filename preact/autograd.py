"""Autograd Functions: which tensors are saved for backward, and which op runs when.

Saved are the inputs of the batch norms, per-channel vectors and weights; the activations between
are computed again in backward, or kept with ``save_activation`` where they are written at all (a
fused convolution writes none). Forwards are functional, no input is written to.

Statistics come in as constants and are differentiated through by formula: with ``batch_stats`` the
caller promises that ``mean`` and ``var`` are those of ``input`` itself.

A backward that must itself be differentiated (``create_graph=True``) differentiates the eager
composition of the same forward instead, so gradients of any order are right, at eager's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, plans
from .plans import Geometry
from .prefix import (
    Affine,
    Needs,
    Pending,
    Settings,
    activate,
    cast_like,
    differentiable_backward,
    eager_prefix,
    fused_backward,
    paired,
    prefix_backward,
    prefix_convolutions,
)
from .remembered import Kept


class BackwardChoice(NamedTuple):
    """What is decided of a residual unit's layers when its backward runs."""

    fuses: tuple[tuple[bool, ...], ...]
    """Of each layer which of its convolutions run in kernels of our own."""
    pending: tuple[bool, ...]
    """Whether each layer leaves its gradient's last step to the layer before it."""


class UnitSettings(NamedTuple):
    """What is decided of a residual unit before it runs."""

    eps: tuple[float, ...]
    batch_stats: tuple[bool, ...]
    geometries: tuple[Geometry, ...]
    projection: Geometry | None
    fuses: tuple[tuple[bool, ...], ...]
    """Of each layer which of its convolutions run in forward in kernels of our own."""
    save: bool
    """Whether a backward may follow; without one, no layer's input outlives the next."""
    save_activation: bool
    return_statistics: bool
    backward: Kept[BackwardChoice]


class BatchNormReLU(torch.autograd.Function):
    """``relu(batch_norm(input))``; saves ``input`` and vectors, no activation and no mask."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        input: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(input, mean, var, weight, bias)
        ctx.settings = settings
        norm = settings.norm(mean, var, weight, bias)
        return activate(backends.table(settings.backend), input, norm, input.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, bias = ctx.saved_tensors
        settings = ctx.settings
        eps, batch_stats = settings.eps, settings.batch_stats
        norm = settings.norm(mean, var, weight, bias)
        if torch.is_grad_enabled():
            found = differentiable_backward(
                lambda: eager_prefix(input, norm, []), grad_outputs, [input, weight, bias]
            )
            return (None, found[0], None, None, found[1], found[2])
        table = backends.table(settings.backend)
        grad_output = grad_outputs[0]
        vectors = (input, mean, var, weight, bias)
        needs_norm = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        grad_input: Tensor | None = None
        if needs_norm or batch_stats:
            grad_weight, grad_bias = table.batch_norm_relu_backward_reduce(
                grad_output, *vectors, eps
            )
        if ctx.needs_input_grad[1]:
            sums = (grad_weight, grad_bias) if batch_stats else (None, None)
            grad_input = table.batch_norm_relu_backward_apply(
                grad_output, *vectors, *sums, None, eps
            )
        return (
            None, grad_input, None, None,
            cast_like(grad_weight, weight) if weight is not None else None,
            cast_like(grad_bias, bias) if bias is not None else None,
        )  # fmt: skip


class BatchNormReLUConv2d(torch.autograd.Function):
    """One shared BN-ReLU feeding one or several convolutions, a residual added to the first.

    Returns the convolutions' results, then the mean and variance of the first (after the residual)
    with ``settings.statistics``. ``conv_parameters`` are weight and bias (or None) of each in turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        input: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        *conv_parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, statistics, activation = prefix_convolutions(
            settings.backend,
            input,
            settings.norm(mean, var, weight, bias),
            paired(conv_parameters, settings.geometries),
            settings.fuses,
            residual,
            settings.statistics,
        )
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input, mean, var, weight, bias,
            activation if settings.keeps_activation else None,
            *conv_parameters,
        )  # fmt: skip
        ctx.settings = settings
        return (*outputs, *statistics)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, bias, activation, *conv_parameters = ctx.saved_tensors
        settings = ctx.settings
        geometries = settings.geometries
        norm = settings.norm(mean, var, weight, bias)
        grads = grad_outputs[: len(geometries)]
        needs = ctx.needs_input_grad
        grad_residual = grads[0] if needs[6] else None
        if torch.is_grad_enabled():
            convs = paired(conv_parameters, geometries)
            found = differentiable_backward(
                lambda: eager_prefix(input, norm, convs),
                grads,
                [input, weight, bias, *conv_parameters],
            )
            return (None, found[0], None, None, found[1], found[2], grad_residual, *found[3:])
        wanted = Needs(
            needs[1], needs[4] or needs[5], list(zip(needs[7::2], needs[8::2], strict=True))
        )
        described = (settings.backend, input, conv_parameters[::2], geometries)
        fuses = settings.backward.get(lambda: fused_backward(*described, wanted))
        result = prefix_backward(
            settings.backend, input, norm, conv_parameters[::2], geometries, fuses, grads,
            activation, None, wanted,
        )  # fmt: skip
        assert not isinstance(result.input, Pending)
        return (
            None, result.input, None, None, cast_like(result.weight, weight) if needs[4] else None,
            cast_like(result.bias, bias) if needs[5] else None, grad_residual,
            *(grad for pair in result.convs for grad in pair),
        )  # fmt: skip


def unit_forward(
    backend: str,
    input: Tensor,
    settings: UnitSettings,
    parameters: Sequence[Tensor | None],
    saved: list[Tensor | None],
) -> tuple[Tensor, ...]:
    """What ``ResidualUnit`` takes and returns. Where ``settings.save``, what backward needs of each
    layer is added to ``saved``: its input, mean, variance and activation or None."""
    table = backends.table(backend)
    eps, batch_stats, geometries, projection, fuses, save, save_activation, return_statistics, _ = (
        settings
    )
    save_activation = plans.keeps_activation(save_activation)
    inner: list[Tensor] = []
    x, shortcut = input, input
    last = len(geometries) - 1
    known: tuple[Tensor, ...] = ()
    for index, geometry in enumerate(geometries):
        weight, bias, mean, var, *conv_parameters = parameters[6 * index : 6 * index + 6]
        if mean is None or var is None:
            mean, var = known or table.batch_norm_stats(x)
            inner += [mean, var]
        norm = Affine(mean, var, weight, bias, eps[index], batch_stats[index])
        used = [geometry]
        if index == 0 and projection is not None:
            conv_parameters += parameters[-2:]
            used.append(projection)
        follows = index < last and parameters[6 * (index + 1) + 2] is None
        adds = index == last and (index > 0 or projection is None)
        (output, *projected), known, activation = prefix_convolutions(
            backend, x, norm, paired(conv_parameters, used), fuses[index],
            shortcut if adds else None, return_statistics if adds else follows,
        )  # fmt: skip
        shortcut = projected[0] if projected else shortcut
        if index == last and not adds:  # one layer, whose shortcut is projected along with it
            output, *found = table.identity_add(output, shortcut)
            known = tuple(found)
        if save:
            saved += [x, mean, var, activation if save_activation else None]
        x = output
    return (x, *(known if return_statistics else ()), *inner)


class ResidualUnit(torch.autograd.Function):
    """A full pre-activation unit: BN-ReLU-conv several times, then the shortcut's addition.

    The shortcut is ``input`` itself, or the convolution ``projection`` of the first activation.
    ``parameters`` holds six tensors a layer (norm weight, norm bias, mean, var, conv weight, conv
    bias), with mean and var None where the layer takes its own input's statistics, and then the
    projection's weight and bias if it has one. Returns the sum, its mean and variance where
    ``return_statistics``, then mean and variance of each layer that took its own.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: str, input: Tensor, settings: UnitSettings, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        saved: list[Tensor | None] = []
        outputs = unit_forward(backend, input, settings, parameters, saved)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        if settings.save:
            ctx.save_for_backward(*saved, *parameters)
        ctx.settings = (backend, settings)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        backend, settings = ctx.settings
        eps, batch_stats, geometries, projection, *_ = settings
        layers, saved = len(geometries), ctx.saved_tensors
        parameters = saved[4 * layers :]
        grad_output = grad_outputs[0]
        needs = ctx.needs_input_grad[3:]
        if grad_output is None:
            return (None,) * (3 + len(parameters))
        if torch.is_grad_enabled():
            found = differentiable_backward(
                lambda: [eager_unit(saved[0], settings, saved[1:3], parameters)],
                [grad_output],
                [saved[0], *parameters],
            )
            return (None, found[0], None, *found[1:])

        gradients: list[Tensor | None] = [None] * len(parameters)
        grad: Tensor | Pending | None = grad_output
        layer_needs = _layer_needs(ctx.needs_input_grad[1], needs, layers, projection is not None)
        fuses, pending = settings.backward.get(
            lambda: _decide_backward(backend, settings, saved, parameters, layer_needs)
        )
        for index in reversed(range(layers)):
            x, mean, var, activation = saved[4 * index : 4 * index + 4]
            first = 6 * index
            weight, bias, _, _, conv_weight, _ = parameters[first : first + 6]
            weights, used, grads = [conv_weight], [geometries[index]], [grad]
            grad_skip: Tensor | None = None
            if index == 0 and projection is not None:
                weights.append(parameters[-2])
                used.append(projection)
                grads.append(grad_output)
            elif index == 0:
                grad_skip = grad_output
            norm = Affine(mean, var, weight, bias, eps[index], batch_stats[index])
            result = prefix_backward(
                backend, x, norm, weights, used, fuses[index], grads, activation, grad_skip,
                layer_needs[index], pending[index],
            )  # fmt: skip
            grad = result.input
            if needs[first]:
                gradients[first] = cast_like(result.weight, weight)
            if needs[first + 1]:
                gradients[first + 1] = cast_like(result.bias, bias)
            gradients[first + 4], gradients[first + 5] = result.convs[0]
            if len(result.convs) == 2:
                gradients[-2], gradients[-1] = result.convs[1]
            if not layer_needs[index].input:
                break
        assert not isinstance(grad, Pending)
        return (None, grad if ctx.needs_input_grad[1] else None, None, *gradients)


def _decide_backward(
    backend: str,
    settings: UnitSettings,
    saved: Sequence[Tensor],
    parameters: Sequence[Tensor],
    needs: Sequence[Needs],
) -> BackwardChoice:
    """``saved`` and ``parameters`` are those that the unit saved, of its layers in turn."""
    fuses: list[tuple[bool, ...]] = []
    pending: list[bool] = []
    for index, geometry in enumerate(settings.geometries):
        weights, used = [parameters[6 * index + 4]], [geometry]
        if index == 0 and settings.projection is not None:
            weights.append(parameters[-2])
            used.append(settings.projection)
        leaves = False
        if index > 0 and fuses[-1][0] and not needs[index - 1].convs[0][1]:
            before = (saved[4 * index - 4], parameters[6 * index - 2])
            leaves = plans.leaves_pending(backend, *before, settings.geometries[index - 1])
        pending.append(leaves)
        fuses.append(fused_backward(backend, saved[4 * index], weights, used, needs[index]))
    return BackwardChoice(tuple(fuses), tuple(pending))


def _layer_needs(input: bool, needs: Sequence[bool], layers: int, projected: bool) -> list[Needs]:
    """What each layer of a unit has to give, from what each of its parameters needs."""
    found = []
    for index in range(layers):
        first = 6 * index
        convs = [(needs[first + 4], needs[first + 5])]
        if index == 0 and projected:
            convs.append((needs[-2], needs[-1]))
        below = input or any(needs[:first]) or (index > 0 and projected and any(needs[-2:]))
        found.append(Needs(below, needs[first] or needs[first + 1], convs))
    return found


def eager_unit(
    input: Tensor,
    settings: UnitSettings,
    statistics: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """The unit in operations autograd differentiates any number of times."""
    eps, batch_stats, geometries, projection, *_ = settings
    x, shortcut = input, input
    for index, geometry in enumerate(geometries):
        weight, bias, mean, var, conv_weight, conv_bias = parameters[6 * index : 6 * index + 6]
        if mean is None or var is None:
            mean, var = statistics
        assert conv_weight is not None
        convs = [(conv_weight, conv_bias, geometry)]
        if index == 0 and projection is not None:
            assert parameters[-2] is not None
            convs.append((parameters[-2], parameters[-1], projection))
        norm = Affine(mean, var, weight, bias, eps[index], batch_stats[index])
        x, *projected = eager_prefix(x, norm, convs)
        shortcut = projected[0] if projected else shortcut
    return x + shortcut


class IdentityAdd(torch.autograd.Function):
    """``input + other`` with the mean and variance of the sum; saves nothing."""

    @staticmethod
    def forward(ctx: Any, backend: str, input: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        output, mean, var = backends.table(backend).identity_add(input, other)
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        return (
            None,
            grad if ctx.needs_input_grad[1] else None,
            grad if ctx.needs_input_grad[2] else None,
        )
