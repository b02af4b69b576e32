"""The identity unit as one autograd Function around one op each way.

What ``autograd.ResidualUnit`` does op by op in Python, for the units of which networks are mostly
made: no projection, no bias, every convolution fused. Between kernels of a millisecond the way
through Python counts: float32 steps are 1.03 to 1.05 times faster without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, plans, tuning
from .arguments import Conv, Norm, Statistics
from .autograd import eager_unit
from .plans import Geometry
from .prefix import differentiable_backward
from .reference import memory_format_of
from .reference_unit import TENSORS

Layers = Sequence[tuple[Norm, Conv]]


class Settings(NamedTuple):
    eps: tuple[float, ...]
    batch_stats: tuple[bool, ...]
    geometries: tuple[Geometry, ...]
    numbers: tuple[int, ...]
    """The geometries one after the other, as the ops take them."""
    save: bool
    """Whether a backward may follow."""


_known: dict[tuple[object, ...], Settings] = {}
"""Calls that were checked and found to run as one op, by everything that this depends on."""
_MOST_KNOWN = 4096


def key_of(input: Tensor, layers: Layers) -> tuple[object, ...] | None:
    """What checks and choices depend on, but for the values; None where this is not for the unit's
    one op at all."""
    if (
        torch.compiler.is_compiling()
        or type(input) is not Tensor
        or not input.is_cpu
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    autocast = torch.is_autocast_enabled("cpu")
    parts: list[object] = [
        input.shape, input.stride(), input.dtype, input.requires_grad, torch.is_grad_enabled(),
        autocast and torch.get_autocast_dtype("cpu"), torch.get_num_threads(),
        backends.choose("cpu"), plans.current(), tuning.setting(),
    ]  # fmt: skip
    for norm, conv in layers:
        parts += (
            norm.training, norm.eps, conv.bias is None,
            conv.stride, conv.padding, conv.dilation, conv.groups,
        )  # fmt: skip
        for tensor in (*norm[:4], conv.weight):
            if tensor is None:
                parts.append(None)
            else:
                parts += (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.is_cpu)
    return tuple(parts)


def known(key: tuple[object, ...] | None) -> Settings | None:
    """The settings of a call that passed every check before."""
    return None if key is None else _known.get(key)


def settings_for(
    key: tuple[object, ...],
    input: Tensor,
    layers: Layers,
    geometries: Sequence[Geometry | None],
) -> Settings | None:
    """The settings of a unit, remembered under ``key``; None where it does not run as one op: where
    a convolution runs unfused one way, or only some gradients are wanted."""
    if plans.current() not in ("auto", "E"):
        return None
    save = torch.is_grad_enabled()
    training = save and input.requires_grad
    found: list[Geometry] = []
    for index, ((norm, conv), geometry) in enumerate(zip(layers, geometries, strict=True)):
        assert geometry is not None
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
        # The layers' inputs are of one type, layout and extent, those of the unit's.
        shape = (input.size(0), conv.weight.size(1) * conv.groups, *input.shape[2:])
        x = input if shape == tuple(input.shape) else _like(input, shape)
        weight = conv.weight.detach().to(input.dtype)
        if not all(plans.fuses_convolution("cpp", x, weight, geometry, work) for work in works):
            return None
        found.append(geometry)
    settings = Settings(
        tuple(norm.eps for norm, _ in layers), tuple(norm.training for norm, _ in layers),
        tuple(found), flattened(found), save,
    )  # fmt: skip
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = settings
    return settings


def _like(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input)
    )


def run(
    input: Tensor, layers: Layers, settings: Settings, first: Statistics, return_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    """``functional.residual_unit`` for a unit whose ``settings`` were found; ``first`` are the
    statistics of its input, or the running ones in evaluation."""
    parameters: list[Tensor | None] = []
    for index, (norm, conv) in enumerate(layers):
        vectors: tuple[Tensor | None, Tensor | None] = first
        if index > 0:
            vectors = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        parameters += (*vectors, norm.weight, norm.bias, conv.weight)
    output, *found = IdentityUnit.apply(input, settings, *parameters)
    statistics = [*first, *found[2:]]
    running: list[Tensor] = []
    batch: list[Tensor] = []
    momenta: list[float] = []
    for index, (norm, _) in enumerate(layers):
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            running += (norm.running_mean, norm.running_var)
            batch += statistics[2 * index : 2 * index + 2]
            momenta.append(norm.momentum)
    if momenta:
        # An identity unit has as many values per channel all along.
        count = input.numel() // input.size(1)
        torch.ops.preact.update_running_stats(running, batch, momenta, count)
        torch.autograd.graph.increment_version(running)
    return output, (found[0], found[1]) if return_statistics else None


class IdentityUnit(torch.autograd.Function):
    """The sum with its mean and variance, then mean and variance of each inner layer's input.

    ``parameters`` holds mean, var, weight and bias of each norm and the weight of its convolution,
    which may be wider than ``input``, as under autocast; mean and var are None where an inner layer
    takes its own input's statistics. Saves the layers' inputs, vectors and weights.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, settings: Settings, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        eps, _, _, numbers, save = settings
        output, *found = torch.ops.preact.residual_unit(input, parameters, eps, numbers)
        inputs, vectors = [input], found[:2]
        known = list(parameters)
        for index in range(1, len(eps)):
            x, mean, var = found[3 * index - 1 : 3 * index + 2]
            inputs.append(x)
            vectors += [mean, var]
            if parameters[TENSORS * index] is None:
                known[TENSORS * index : TENSORS * index + 2] = [mean, var]
        ctx.mark_non_differentiable(*vectors)
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(*inputs, *known)
        ctx.settings = settings
        return (output, *vectors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        eps, batch_stats, _, numbers, _ = ctx.settings
        saved = ctx.saved_tensors
        inputs, parameters = saved[: len(eps)], saved[len(eps) :]
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * (2 + len(parameters))
        gradients: list[Tensor | None] = [None] * len(parameters)
        if torch.is_grad_enabled():
            input, *found = differentiable_backward(
                lambda: [_eager(inputs[0], ctx.settings, parameters)],
                [grad_output],
                [inputs[0], *parameters],
            )
            return (input, None, *found)
        input, *found = torch.ops.preact.residual_unit_backward(
            grad_output, inputs, parameters, eps, batch_stats, numbers
        )
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
    eps, batch_stats, geometries, _, save = settings
    arranged: list[Tensor | None] = []
    for index in range(len(eps)):
        mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
        assert conv is not None
        arranged += [weight, bias, mean, var, conv.to(input.dtype), None]
    return eager_unit(input, (eps, batch_stats, geometries, None, save, False, False), (), arranged)
