"""Identity units in sequence as one autograd Function around one op each way.

What ``autograd.ResidualUnit`` does op by op in Python, for the units of which networks are mostly
made: no projection, no bias, every convolution fused. Between kernels of a millisecond the way
through Python counts, cold as it is each time: ``remembered`` calls come here at once, and the
units of a stage pass it once for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plans
from .arguments import Conv, Norm, Statistics
from .autograd import UnitSettings, eager_unit
from .checks import layer_shapes
from .plans import Geometry
from .prefix import differentiable_backward
from .reference import memory_format_of
from .reference_units import NUMBERS, TENSORS
from .remembered import Kept
from .running_stats import running_statistics, update_running_stats

Layers = Sequence[tuple[Norm, Conv]]


class Settings(NamedTuple):
    eps: tuple[float, ...]
    batch_stats: tuple[bool, ...]
    geometries: tuple[Geometry, ...]
    numbers: tuple[int, ...]
    """The geometries one after the other, as the ops take them."""
    differentiable: bool
    """Whether a backward may follow."""
    depth: int
    """Layers of a unit."""


def settings_for(
    input: Tensor,
    layers: Layers,
    geometries: Sequence[Geometry],
) -> Settings | None:
    """The settings of a unit; None where it does not run as one op: where a convolution runs
    unfused one way, only some gradients are wanted, or an inner map is of another extent."""
    if plans.current() not in ("auto", "E"):
        return None
    shapes = layer_shapes(input, layers, geometries)
    if any(shape[2:] != input.shape[2:] for shape in shapes):
        return None
    save = torch.is_grad_enabled()
    training = save and input.requires_grad
    last = memory_format_of(input) == torch.channels_last
    found: list[Geometry] = []
    for index, ((norm, conv), geometry) in enumerate(zip(layers, geometries, strict=True)):
        wanted = {
            parameter.requires_grad
            for parameter in (norm.weight, norm.bias, conv.weight)
            if parameter is not None
        }
        if conv.bias is not None or (save and wanted != {training}):
            return None
        alone = "forward with residual" if index + 1 == len(layers) else "forward"
        works = ["forward with statistics" if norm.training else alone]
        works += ["backward"] if training else []
        # The layers' inputs are of one type and layout, those of the unit's.
        shape = shapes[index]
        x = input if shape == tuple(input.shape) else like(input, shape, last)
        if not all(
            plans.fuses_convolution("cpp", x, conv.weight, geometry, work, input.dtype)
            for work in works
        ):
            return None
        found.append(geometry)
    return Settings(
        tuple(norm.eps for norm, _ in layers), tuple(norm.training for norm, _ in layers),
        tuple(found), flattened(found), training, len(layers),
    )  # fmt: skip


def joined(units: Sequence[Settings]) -> Settings | None:
    """The settings of units in sequence; None where they are not alike enough for one op."""
    if len({(unit.differentiable, unit.depth) for unit in units}) > 1:
        return None
    eps, batch_stats, geometries, numbers, _, _ = (
        tuple(itertools.chain.from_iterable(values)) if isinstance(values[0], tuple) else ()
        for values in zip(*units, strict=True)
    )
    return Settings(eps, batch_stats, geometries, numbers, units[0].differentiable, units[0].depth)


def like(input: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """What an inner layer of ``input``'s unit takes, to be looked at only."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)


def run(
    input: Tensor, layers: Layers, settings: Settings, first: Statistics, return_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    """``functional.residual_units`` for units whose ``settings`` were found, ``layers`` those of
    all; ``first`` are the statistics of ``input``, or the running ones in evaluation."""
    parameters: list[Tensor | None] = []
    for index, (norm, conv) in enumerate(layers):
        vectors: tuple[Tensor | None, Tensor | None] = first
        if index > 0:
            vectors = (None, None) if norm.training else running_statistics(norm)
        parameters += (*vectors, norm.weight, norm.bias, conv.weight)
    if settings.differentiable:
        output, *found = IdentityUnits.apply(input, settings, *parameters)
    else:
        output, found = _run_unit_by_unit(input, parameters, settings)
    statistics = [*first, *found[2:]]
    trained = [index for index, (norm, _) in enumerate(layers) if norm.training]
    if trained:
        # By ``settings_for`` there are as many values per channel all along.
        update_running_stats(
            [layers[index][0] for index in trained],
            [statistics[2 * index : 2 * index + 2] for index in trained],
            input.numel() // input.size(1),
        )
    return output, (found[0], found[1]) if return_statistics else None


def _run_unit_by_unit(
    input: Tensor, parameters: Sequence[Tensor | None], settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    """What ``IdentityUnits`` returns, where no backward follows: one op for all would hold every
    layer's input until the last."""
    eps, _, _, numbers, _, depth = settings
    handed_on = list(parameters[:2])
    vectors: list[Tensor] = []
    for start in range(0, len(eps), depth):
        end = start + depth
        own = list(parameters[TENSORS * start : TENSORS * end])
        if own[0] is None:
            own[:2] = handed_on
        input, *found = vectors_of(
            torch.ops.preact.residual_units(
                input, own, eps[start:end], numbers[NUMBERS * start : NUMBERS * end], depth
            )
        )
        handed_on, inner = list(found[:2]), found[2:]
        vectors += [*inner, *found[:2]]
    return input, [*vectors[-2:], *vectors[:-2]]


def vectors_of(whole: Sequence[Tensor]) -> list[Tensor]:
    """The sum and every mean and variance of what the op returns, without the layers' inputs."""
    return [tensor for index, tensor in enumerate(whole) if index < 3 or index % 3 != 0]


class IdentityUnits(torch.autograd.Function):
    """The last sum with its mean and variance, then those of the input of each layer but the first.

    ``parameters`` holds mean, var, weight and bias of each norm and the weight of its convolution,
    which may be wider than ``input``, as under autocast; mean and var are None where an inner layer
    takes its own input's statistics. Saves the layers' inputs, vectors and weights.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, settings: Settings, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        eps, _, _, numbers, _, depth = settings
        whole = torch.ops.preact.residual_units(input, parameters, eps, numbers, depth)
        output, *vectors = vectors_of(whole)
        known = list(parameters)
        for index in range(1, len(eps)):
            if parameters[TENSORS * index] is None:
                known[TENSORS * index : TENSORS * index + 2] = vectors[2 * index : 2 * index + 2]
        ctx.mark_non_differentiable(*vectors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, *whole[3::3], *known)
        ctx.settings = settings
        return (output, *vectors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        eps, batch_stats, _, numbers, _, depth = ctx.settings
        saved = ctx.saved_tensors
        inputs, parameters = saved[: len(eps)], saved[len(eps) :]
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * (2 + len(parameters))
        if torch.is_grad_enabled():
            input, *found = differentiable_backward(
                lambda: [_eager(inputs[0], ctx.settings, parameters)],
                [grad_output],
                [inputs[0], *parameters],
            )
            return (input, None, *found)
        input, *found = torch.ops.preact.residual_units_backward(
            grad_output, inputs, parameters, eps, batch_stats, numbers, depth
        )
        gradients: list[Tensor | None] = [None] * len(parameters)
        for index in range(len(eps)):
            first, found_here = TENSORS * index, found[3 * index : 3 * index + 3]
            gradients[first + 2 : first + TENSORS] = [
                gradient if parameter is not None else None
                for gradient, parameter in zip(
                    found_here, parameters[first + 2 : first + TENSORS], strict=True
                )
            ]
        return (input, None, *gradients)


def flattened(geometries: Sequence[Geometry]) -> tuple[int, ...]:
    return tuple(
        number
        for stride, padding, dilation, groups in geometries
        for number in (*stride, *padding, *dilation, groups)
    )


def _eager(input: Tensor, settings: Settings, parameters: Sequence[Tensor | None]) -> Tensor:
    eps, batch_stats, geometries, _, _, depth = settings
    for start in range(0, len(eps), depth):
        unit = slice(start, start + depth)
        arranged: list[Tensor | None] = []
        for index in range(start, start + depth):
            mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
            assert conv is not None
            arranged += [weight, bias, mean, var, conv.to(input.dtype), None]
        its_own = UnitSettings(
            eps[unit], batch_stats[unit], geometries[unit], None, (), True, False, False, Kept()
        )
        input = eager_unit(input, its_own, (), arranged)
    return input
