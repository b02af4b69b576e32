"""Full pre-activation units with their inner norms folded: each in the convolution before it.

Where an inner norm is folded, that convolution is the library's with scaled weights and the ReLU
in its pass; where it is not, BN-ReLU-conv runs as one prefix. Which is faster depends on the
shapes, so the first call of each tries every combination on its own operands, and what is clearly
the fastest is kept. Where nothing may be measured all norms stay as they are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import backends, checks, plans, trials, tuning
from .calls import (
    BatchNorm,
    Layer,
    conv_arguments,
    described_layers,
    fused_batch_norm_relu,
    fused_prefix,
    fused_unit,
    fused_units,
)
from .folded import applies, convolve, forget, runs_in_one_dnn
from .functional import Statistics, geometry_of, output_shape
from .reference import memory_format_of

Folds = tuple[bool, ...]
"""Of each norm of a unit but the first whether it is in the convolution before it."""

CLEARLY, SECONDS = 0.95, 10.0
"""The share of the unfolded unit's time that another must stay under; for measuring, a process."""

_log = logging.getLogger("preact")
_budget = trials.Budget(SECONDS)
_known: WeakKeyDictionary[nn.Conv2d, dict[tuple[object, ...], Folds]] = WeakKeyDictionary()
"""Of each unit, by its first convolution, what was decided for inputs of a kind."""
_decided: dict[str, str] = {}
"""What was decided of each problem, in words."""
_MOST = 64


def folded_unit(
    input: Tensor,
    layers: Sequence[Layer],
    projection: nn.Conv2d | None = None,
    save_activation: bool = False,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``calls.fused_unit``, its inner norms folded where that is allowed and faster."""
    folds = _folds(input, layers, projection)
    if any(folds):
        return _run(input, layers, projection, folds), None
    return fused_unit(input, layers, projection, save_activation, statistics, return_statistics)


def folded_units(
    input: Tensor,
    units: Sequence[Sequence[Layer]],
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``calls.fused_units``, likewise; those that stay unfolded run together as ever."""
    if not applies(input, [bn for layers in units for bn, _ in layers]):
        return fused_units(input, units, statistics, return_statistics)
    # All have inputs of one kind, the first one's.
    alike = itertools.groupby(units, key=lambda layers: _folds(input, layers, None))
    for folds, together in alike:
        if any(folds):
            for layers in together:
                input = _run(input, layers, None, folds)
        else:
            input, _ = fused_units(input, list(together))
    return input, None


def _folds(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> Folds:
    """What to fold in this call; empty where it may not."""
    if not applies(input, [bn for bn, _ in layers]):
        return ()
    autocast = torch.is_autocast_enabled("cpu")
    kind = (
        input.shape, input.stride(), input.dtype, type(input), input.device,
        autocast and torch.get_autocast_dtype("cpu"), torch.get_num_threads(),
        backends.choose(input.device.type), plans.current(), tuning.why_not(input.device),
        tuple([conv.weight.dtype for _, conv in layers]), projection is None,
        torch._C._get_tracing_state() is None, torch._C._len_torch_dispatch_stack(),
    )  # fmt: skip
    of_unit = _known.setdefault(layers[0][1], {})
    folds = of_unit.get(kind)
    if folds is None:
        folds = _decide(input, layers, projection)
        if len(of_unit) >= _MOST:
            of_unit.clear()
        of_unit[kind] = folds
    return folds


def _decide(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> Folds:
    """What to fold; raises what the unit would."""
    unfolded: Folds = (False,) * (len(layers) - 1)
    if not unfolded or not _serves(input, layers, projection):
        return unfolded
    problem = _problem(input, layers, projection)
    if _budget.left() <= 0 and tuning.kept("fold", problem, input.device) is None:
        _decided.setdefault(problem, "nothing folded, no time left to measure")
        return unfolded
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])

    def run(folds: Folds) -> object:
        if any(folds):
            return _run(input, layers, projection, folds)
        return fused_unit(input, layers, projection)

    ways = list(itertools.product((False, True), repeat=len(unfolded)))
    try:
        folds = trials.select_on_cpu("fold", problem, ways, run, CLEARLY, _budget)
    finally:
        forget(convs)  # what was made for the ways not taken
    measured = tuning.is_known("fold", problem, input.device)
    names = [f"norm {i + 2}" for i, fold in enumerate(folds) if fold]
    how = "measured" if measured else f"not measured: {tuning.why_not(input.device)}"
    _decided[problem] = f"{' and '.join(names) or 'nothing'} folded, {how}"
    _log.info("%s: %s", problem, _decided[problem])
    return folds


def _serves(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> bool:
    """Whether the unit may run with convolutions of oneDNN's; raises for a wrong argument."""
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])
    if (
        type(input) is not Tensor
        or input.layout is not torch.strided
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or not runs_in_one_dnn(input)
        or any(isinstance(conv.padding, str) for conv in convs)
        or any(torch.nn.utils.parametrize.is_parametrized(conv) for conv in convs)
        or any(checks.compute_type(conv.weight) != input.dtype for conv in convs)
    ):
        return False
    known = described_layers(layers, input)
    geometries = [geometry_of(conv) for _, conv in known]
    result = checks.layer_shapes(input, known, geometries)[-1]
    if projection is None:
        return result == tuple(input.shape)
    of_shortcut = conv_arguments(projection)
    checks.check_conv(input, of_shortcut)
    return result == output_shape(input.shape, of_shortcut, geometry_of(of_shortcut))


def _problem(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> str:
    """A unit in words, with all that the time of its ways depends on."""
    parts = [f"{_by(input.shape)} {str(input.dtype)[6:]}"]
    last = memory_format_of(input) == torch.channels_last
    parts.append("channels_last" if last else "contiguous")
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])
    for conv in convs:
        groups = "" if conv.groups == 1 else f" groups {conv.groups}"
        stride = "" if max(checks.pair(conv.stride)) == 1 else f" stride {conv.stride}"
        dilation = "" if max(checks.pair(conv.dilation)) == 1 else f" dilation {conv.dilation}"
        bias = "" if conv.bias is None else " bias"
        parts.append(f"* {_by(conv.weight.shape)}{stride}{dilation}{groups}{bias}")
    if projection is not None:
        parts.append("as shortcut")
    backend = backends.choose("cpu")
    parts.append(f"{torch.get_num_threads()} threads {backend} {plans.current()}")
    return " ".join(parts)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _run(
    input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None, folds: Folds
) -> Tensor:
    """The unit, layer by layer; a projection reads the first activation."""
    x, shortcut = input, input
    activated = False
    for index, (bn, conv) in enumerate(layers):
        last = index + 1 == len(layers)
        into = None if last or not folds[index] else layers[index + 1][0]
        if activated or into is not None:
            x = x if activated else _activate(x, bn)
            if index == 0 and projection is not None:
                shortcut = convolve(x, projection)
            x = convolve(x, conv, into, into is not None, shortcut if last else None)
        elif index == 0 and projection is not None:
            x, shortcut = fused_prefix(x, bn, [conv, projection])
        else:
            (x,) = fused_prefix(x, bn, [conv], shortcut if last else None)
        activated = into is not None
    return x


def _activate(input: Tensor, bn: BatchNorm) -> Tensor:
    """``fused_batch_norm_relu`` of what was checked before."""
    backend = backends.choose("cpu")
    if backend == "reference":
        return fused_batch_norm_relu(bn, input)
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    activation: Tensor = backends.table(backend).batch_norm_relu(input, *norm)
    return activation


def describe() -> list[str]:
    """A line for each unit decided in this process."""
    return [f"{problem}: {decided}" for problem, decided in _decided.items()]
