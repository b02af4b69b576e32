"""Full pre-activation units with their inner norms folded, each in the convolution before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from . import backends, checks, folded_choice
from .calls import (
    BatchNorm,
    Layer,
    conv_arguments,
    described_layers,
    fused_batch_norm_relu,
    fused_unit,
    fused_units,
)
from .folded import applies, convolve
from .folded_choice import Candidate, in_words
from .functional import Statistics, geometry_of, output_shape

Units = Sequence[Sequence[Layer]]

TRIED = 3
"""Units of a sequence that are measured: as one op unfolded, they hand no time on to Python."""


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
        return _run(input, [layers], projection), None
    return fused_unit(input, layers, projection, save_activation, statistics, return_statistics)


def folded_units(
    input: Tensor,
    units: Units,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``calls.fused_units``, folded where all of it may be and that is faster."""
    if _folds(input, units, None):
        return _run(input, units, None), None
    return fused_units(input, units, statistics, return_statistics)


def _folds(input: Tensor, units: Units, projection: nn.Conv2d | None) -> bool:
    if not applies(input, [bn for layers in units for bn, _ in layers]):
        return False
    convs = [conv for layers in units for _, conv in layers]
    if projection is not None:
        convs.append(projection)

    def candidate() -> Candidate:
        tried = units[:TRIED]
        words = []
        for layers in tried:
            words += [f"* {in_words(conv)}" for _, conv in layers]
            words.append("+ input" if projection is None else f"+ {in_words(projection)}")
        return Candidate(
            convs,
            lambda: all(_serves(input, layers, projection) for layers in units),
            lambda: _unfolded(input, tried, projection),
            lambda: _run(input, tried, projection),
            " ".join(words),
        )

    return folded_choice.folds(input, convs, candidate, projection is None, len(units))


def _serves(input: Tensor, layers: Sequence[Layer], projection: nn.Conv2d | None) -> bool:
    """Whether a unit has an inner norm and adds without broadcasting; raises for a wrong argument.

    A sequence of them has inputs of one shape.
    """
    if len(layers) < 2:
        return False
    known = described_layers(layers, input)
    geometries = [geometry_of(conv) for _, conv in known]
    result = checks.layer_shapes(input, known, geometries)[-1]
    if projection is None:
        return result == tuple(input.shape)
    of_shortcut = conv_arguments(projection)
    checks.check_conv(input, of_shortcut)
    return result == output_shape(input.shape, of_shortcut, geometry_of(of_shortcut))


def _unfolded(input: Tensor, units: Units, projection: nn.Conv2d | None) -> Tensor:
    if len(units) > 1:
        return fused_units(input, units)[0]
    return fused_unit(input, units[0], projection)[0]


def _run(input: Tensor, units: Units, projection: nn.Conv2d | None) -> Tensor:
    """The units with every inner norm folded; a projection reads the first activation."""
    for layers in units:
        x = _activate(input, layers[0][0])
        shortcut = input if projection is None else convolve(x, projection)
        for (_, conv), (bn, _) in itertools.pairwise(layers):
            x = convolve(x, conv, bn, relu=True)
        input = convolve(x, layers[-1][1], residual=shortcut)
    return input


def _activate(input: Tensor, bn: BatchNorm) -> Tensor:
    """``fused_batch_norm_relu`` of what was checked before."""
    backend = backends.choose("cpu")
    if backend == "reference":
        return fused_batch_norm_relu(bn, input)
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    activation: Tensor = backends.table(backend).batch_norm_relu(input, *norm)
    return activation
