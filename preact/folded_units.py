"""Full pre-activation units with their inner norms folded: each in the convolution before it.

The convolutions are the library's then, with scaled weights and the ReLU or the addition in their
own pass; unfolded each runs with the BN-ReLU before it. Which is faster depends on the shapes, so
the first call of each tries both on its own operands, and folds where that is clearly faster. Where
nothing may be measured all norms stay as they are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple
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
    fused_unit,
    fused_units,
)
from .folded import applies, convolve, forget, runs_in_one_dnn
from .functional import Statistics, geometry_of, output_shape
from .reference import memory_format_of

CLEARLY, SECONDS = 0.95, 10.0
"""The share of the unfolded unit's time to stay under; for measuring, a process."""
TRIED = 3
"""Units of a sequence that are measured: as one op unfolded, they hand no time on to Python."""

_MOST = 64
_log = logging.getLogger("preact")
_budget = trials.Budget(SECONDS)
_known: WeakKeyDictionary[nn.Conv2d, dict[tuple[object, ...], bool]] = WeakKeyDictionary()
"""Of each unit or sequence, by its first convolution, what was decided for inputs of a kind."""
_decided: dict[str, str] = {}
"""What was decided of each problem, in words."""


class _Way(NamedTuple):
    folds: bool


def folded_unit(
    input: Tensor,
    layers: Sequence[Layer],
    projection: nn.Conv2d | None = None,
    save_activation: bool = False,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``calls.fused_unit``, its inner norms folded where that is allowed and faster."""
    if _folds(input, [layers], projection):
        return _run(input, layers, projection), None
    return fused_unit(input, layers, projection, save_activation, statistics, return_statistics)


def folded_units(
    input: Tensor,
    units: Sequence[Sequence[Layer]],
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``calls.fused_units``, folded where all of it may be and that is faster."""
    if not _folds(input, units, None):
        return fused_units(input, units, statistics, return_statistics)
    for layers in units:
        input = _run(input, layers, None)
    return input, None


def _folds(input: Tensor, units: Sequence[Sequence[Layer]], projection: nn.Conv2d | None) -> bool:
    """Whether this call folds."""
    if not applies(input, [bn for layers in units for bn, _ in layers]):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    first = units[0]
    kind = (
        input.shape, input.stride(), input.dtype, type(input), input.device,
        autocast and torch.get_autocast_dtype("cpu"), torch.get_num_threads(),
        backends.choose(input.device.type), plans.current(), tuning.why_not(input.device),
        tuple([conv.weight.dtype for _, conv in first]), projection is None, len(units),
        torch._C._get_tracing_state() is None, torch._C._len_torch_dispatch_stack(),
    )  # fmt: skip
    of_unit = _known.setdefault(first[0][1], {})
    folds = of_unit.get(kind)
    if folds is None:
        folds = _decide(input, units, projection)
        if len(of_unit) >= _MOST:
            of_unit.clear()
        of_unit[kind] = folds
    return folds


def _decide(input: Tensor, units: Sequence[Sequence[Layer]], projection: nn.Conv2d | None) -> bool:
    """Whether to fold; raises what the first unit would."""
    if not all(_serves(input, layers, projection) for layers in units):
        return False
    tried = units[:TRIED]
    problem = _problem(input, tried, projection)
    if _budget.left() <= 0 and tuning.kept("fold", problem, input.device) is None:
        _decided.setdefault(problem, "not folded, no time left to measure")
        return False

    def run(way: _Way) -> object:
        x = input
        if way.folds:
            for layers in tried:
                x = _run(x, layers, projection)
            return x
        return fused_units(x, tried) if len(units) > 1 else fused_unit(x, tried[0], projection)

    try:
        ways = (_Way(False), _Way(True))
        folds = trials.select_on_cpu("fold", problem, ways, run, CLEARLY, _budget).folds
    finally:
        forget([conv for layers in tried for _, conv in layers])  # nobody may need their weights
    measured = tuning.is_known("fold", problem, input.device)
    how = "measured" if measured else f"not measured: {tuning.why_not(input.device)}"
    _decided[problem] = f"{'folded' if folds else 'not folded'}, {how}"
    _log.info("%s: %s", problem, _decided[problem])
    return folds


def _serves(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> bool:
    """Whether the unit may run with convolutions of oneDNN's; raises for a wrong argument."""
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])
    if (
        len(layers) < 2
        or type(input) is not Tensor
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


def _problem(input: Tensor, units: Sequence[Sequence[Layer]], projection: nn.Conv2d | None) -> str:
    """Units in words, with all that the time of either way depends on."""
    parts = [f"{_by(input.shape)} {str(input.dtype)[6:]}"]
    last = memory_format_of(input) == torch.channels_last
    parts.append("channels_last" if last else "contiguous")
    for layers in units:
        parts += [f"* {_convolution(conv)}" for _, conv in layers]
        parts.append("+ input" if projection is None else f"+ {_convolution(projection)}")
    parts.append(f"{torch.get_num_threads()} threads {backends.choose('cpu')} {plans.current()}")
    return " ".join(parts)


def _convolution(conv: nn.Conv2d) -> str:
    groups = "" if conv.groups == 1 else f" groups {conv.groups}"
    stride = "" if max(checks.pair(conv.stride)) == 1 else f" stride {conv.stride}"
    dilation = "" if max(checks.pair(conv.dilation)) == 1 else f" dilation {conv.dilation}"
    bias = "" if conv.bias is None else " bias"
    return f"{_by(conv.weight.shape)}{stride}{dilation}{groups}{bias}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _run(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> Tensor:
    """The unit with every inner norm folded; a projection reads the first activation."""
    x = _activate(input, layers[0][0])
    shortcut = input if projection is None else convolve(x, projection)
    for (_, conv), (bn, _) in itertools.pairwise(layers):
        x = convolve(x, conv, bn, relu=True)
    return convolve(x, layers[-1][1], residual=shortcut)


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
