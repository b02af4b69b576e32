"""Residual units op by op: what is decided of one before it runs, and running it by that.

For the units that ``identity_units`` does not take whole: those with a projection or a bias, or
with a convolution that the library runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd
from .arguments import Conv, Statistics
from .autograd import UnitSettings
from .checks import compute_type
from .identity_units import Layers, like
from .plans import Geometry
from .prefix import fused_forward
from .reference import memory_format_of
from .remembered import Kept, carries_tangents
from .running_stats import running_statistics, update_running_stats
from .serving import eager_conv, eager_norm, parameters_of, small


class Prepared(NamedTuple):
    """A call that was checked: the same whatever its tensors hold."""

    backend: str
    settings: UnitSettings | None
    """None where the unit runs prefix by prefix."""
    counts: tuple[int, ...] = ()
    """Values per channel that each norm sees."""

    @property
    def convolves(self) -> bool:
        """Whether a convolution runs in a kernel of our own in forward."""
        return self.settings is not None and any(map(any, self.settings.fuses))


EAGER = Prepared("reference", None)
"""Of a unit whose maps are small."""


def prepare(
    backend: str,
    input: Tensor,
    layers: Layers,
    projection: Conv | None,
    geometries: Sequence[Geometry],
    shapes: Sequence[tuple[int, ...]],
    save_activation: bool,
    return_statistics: bool,
) -> Prepared:
    """``geometries`` ends with the projection's; ``shapes`` are those of the layers' inputs and of
    the result."""
    own = tuple(geometries[: len(layers)])
    fuses: list[tuple[bool, ...]] = []
    # The library's results are in channels_last where either operand is, ours where the input is.
    last = memory_format_of(input) == torch.channels_last
    for index, (norm, conv) in enumerate(layers):
        x = input if index == 0 else like(input, shapes[index], last)
        last = last or memory_format_of(conv.weight) == torch.channels_last
        convs = [(conv.weight, own[index], compute_type(conv.weight))]
        projected = index == 0 and projection is not None
        if projected:
            assert projection is not None
            convs.append((projection.weight, geometries[-1], compute_type(projection.weight)))
        adds = index + 1 == len(layers) and not projected
        fuses.append(fused_forward(backend, x, norm.training, convs, adds))
    settings = UnitSettings(
        tuple(norm.eps for norm, _ in layers),
        tuple(norm.training for norm, _ in layers),
        own,
        geometries[-1] if projection is not None else None,
        tuple(fuses),
        torch.is_grad_enabled(),
        save_activation,
        return_statistics,
        Kept(),
    )
    counts = tuple(batch * height * width for batch, _, height, width in shapes[: len(layers)])
    return Prepared(backend, settings, counts)


def run_eager(input: Tensor, layers: Layers, projection: Conv | None) -> Tensor:
    """The unit in eager PyTorch, its maps being small."""
    small.count += len(layers)
    x, shortcut = input, input
    for index, (norm, conv) in enumerate(layers):
        activation = eager_norm(x, norm)
        x = eager_conv(activation, conv)
        if index == 0 and projection is not None:
            shortcut = eager_conv(activation, projection)
    return x + shortcut


def run(
    prepared: Prepared,
    input: Tensor,
    layers: Layers,
    projection: Conv | None,
    first: Statistics,
) -> tuple[Tensor, Statistics | None]:
    """What ``functional.residual_unit`` returns; ``first`` are the statistics of ``input``, or the
    running ones in evaluation."""
    backend, settings, counts = prepared
    assert settings is not None
    parameters: list[Tensor | None] = []
    for index, (norm, conv) in enumerate(layers):
        known: tuple[Tensor | None, Tensor | None] = first
        if index > 0:
            known = (None, None) if norm.training else running_statistics(norm)
        parameters += [norm.weight, norm.bias, *known, *parameters_of(conv, input.dtype)]
    if projection is not None:
        parameters += parameters_of(projection, input.dtype)
    if settings.save or carries_tangents():
        output, *vectors = autograd.ResidualUnit.apply(backend, input, settings, *parameters)
    else:
        output, *vectors = autograd.unit_forward(backend, input, settings, parameters, [])
    found = iter(vectors)
    handed_on = (next(found), next(found)) if settings.return_statistics else None
    for index, (norm, _) in enumerate(layers):
        if norm.training:
            own = first if index == 0 else (next(found), next(found))
            update_running_stats([norm], [own], counts[index])
    return output, handed_on
