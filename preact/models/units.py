"""Every residual unit of the paper: three branches, five orders of activation, six shortcuts.

A unit is assembled from its branch's convolutions, an ``Arrangement`` of norms and ReLUs around
them, and a ``Shortcut``. Each runs on the fused functions as far as its order allows; what stays
eager PyTorch is told by ``unfused_norms`` and in the report of ``fuse_``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..calls import (
    BatchNorm,
    Layer,
    batch_norm,
    fused_batch_norm_relu,
    fused_unit,
    linked_prefix,
)
from ..folded import WHERE_FASTER
from ..folded_units import folded_unit
from ..functional import Statistics
from ..hooks import is_called_plainly
from . import shortcuts
from .shortcuts import Factor, Shortcut, ZeroPad


class Arrangement(NamedTuple):
    """Where a unit normalises and activates; between its convolutions it is always BN-ReLU.

    Each place holds "", "norm", "relu" or "norm_relu" (figure 4 of the paper).
    """

    before: str
    """Ahead of the first convolution."""
    end: str
    """Behind the last convolution, within the branch."""
    after: str
    """Behind the addition."""


UNITS = {
    "original": Arrangement("", "norm", "relu"),
    "bn_after_addition": Arrangement("", "", "norm_relu"),
    "relu_before_addition": Arrangement("", "norm_relu", ""),
    "relu_only_preactivation": Arrangement("relu", "norm", ""),
    "full_preactivation": Arrangement("norm_relu", "", ""),
}

LAYERS = {"basic": (3, 3), "bottleneck": (1, 3, 1), "one_layer": (3,)}
"""Kernel sizes of a branch's convolutions."""

EXPANSION = 4
"""Channels of a bottleneck's result over those of its 3x3 convolution."""


def out_channels(layers: str, channels: int) -> int:
    return channels * EXPANSION if layers == "bottleneck" else channels


def arrangement(unit: str) -> Arrangement:
    """Raises ``ValueError`` for a name that is not in ``UNITS``."""
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    return UNITS[unit]


class ResidualUnit(nn.Module):
    """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``.

    Children are ``conv1, bn1, conv2, …`` in the branch (``bn1`` ahead of ``conv1`` in full
    pre-activation, behind it otherwise), ``shortcut`` where dimensions change or the shortcut is a
    convolution, and ``weighing`` where the two paths are weighed.

    Args:
        in_channels: channels of the input.
        channels: width of the branch; a bottleneck's result has four times as many.
        stride: of the unit.
        layers: "basic", "bottleneck" or "one_layer".
        unit: a name in ``UNITS``.
        shortcut: a name in ``shortcuts.SHORTCUTS`` or what a function there returns.
        option: what the shortcut does where dimensions change: "A", strided and padded with zero
            channels, or "B", a 1x1 convolution. B works on the activated signal in both
            pre-activations, and has a batch norm of its own where the branch ends in one.
        stride_on: a bottleneck's convolution that has the stride, "3x3" or "1x1", the first.
        activate_before_split: the activation ahead of the first convolution is the shortcut's too,
            as in the first unit of a network (the paper's appendix).
        save_activation: keep activations for backward instead of computing them again.

    Raises:
        ValueError: for a name that is not known.
    """

    folds = False
    """Whether ``fold_`` was asked for."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        layers: str = "basic",
        unit: str = "full_preactivation",
        shortcut: str | Shortcut = "identity",
        option: str = "B",
        stride_on: str = "3x3",
        activate_before_split: bool = False,
        save_activation: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("layers", layers, LAYERS),
            ("option", option, ("A", "B")),
            ("stride_on", stride_on, ("3x3", "1x1")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.arrangement = arrangement(unit)
        self.kind = shortcuts.named(shortcut)
        self.activate_before_split = activate_before_split
        self.save_activation = save_activation
        self._add_branch(in_channels, channels, stride, LAYERS[layers], stride_on)
        width = (in_channels, out_channels(layers, channels))
        self.shortcut = self._carrier(width, stride, option)
        self.weighing = shortcuts.build(self.kind, width, stride)

    def _add_branch(
        self, width: int, channels: int, stride: int, kernels: tuple[int, ...], stride_on: str
    ) -> None:
        strided = 1 if len(kernels) == 3 and stride_on == "3x3" else 0
        self._depth = len(kernels)
        for index, kernel in enumerate(kernels):
            last_of_three = index == 2
            out = channels * EXPANSION if last_of_three else channels
            step = stride if index == strided else 1
            conv = nn.Conv2d(width, out, kernel, step, kernel // 2, bias=False)
            norm = nn.BatchNorm2d(width if self.arrangement.before == "norm_relu" else out)
            pair = [(f"conv{index + 1}", conv), (f"bn{index + 1}", norm)]
            for name, module in pair[::-1] if self.arrangement.before == "norm_relu" else pair:
                self.add_module(name, module)
            width = out

    def _carrier(self, width: tuple[int, int], stride: int, option: str) -> nn.Module | None:
        """What the shortcut does with the signal before it is weighed."""
        if self.kind.kind == "convolution":
            return nn.Conv2d(*width, 1, stride, bias=False)
        if stride == 1 and width[0] == width[1]:
            return None
        if option == "A":
            return ZeroPad(width[1] - width[0], stride)
        projection = nn.Conv2d(*width, 1, stride, bias=False)
        if self.arrangement.end == "":
            return projection
        return nn.Sequential(projection, nn.BatchNorm2d(width[1]))

    @property
    def convs(self) -> list[nn.Conv2d]:
        return [self._modules[f"conv{i + 1}"] for i in range(self._depth)]  # type: ignore[misc]

    @property
    def norms(self) -> list[BatchNorm]:
        return [self._modules[f"bn{i + 1}"] for i in range(self._depth)]  # type: ignore[misc]

    @property
    def takes_statistics(self) -> bool:
        """Whether its first step needs those of its input."""
        return self.arrangement.before == "norm_relu"

    @property
    def projects_activation(self) -> bool:
        """Whether the shortcut is a convolution of the activated signal."""
        changes = self.shortcut is not None and not isinstance(self.shortcut, ZeroPad)
        return changes and self.arrangement.before != "" and self.kind.kind != "convolution"

    def unfused_norms(self) -> dict[nn.Module, str]:
        """The norms that run in eager PyTorch, each with the reason."""
        reasons: dict[nn.Module, str] = {}
        if self.arrangement.end == "norm":
            reasons[self.norms[-1]] = "the addition stands between it and the next ReLU"
        if isinstance(self.shortcut, nn.Sequential):
            reasons[self.shortcut[1]] = "it is on the shortcut, where no ReLU follows"
        return reasons

    def forward(
        self,
        input: Tensor,
        statistics: Statistics | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Statistics | None]:
        """``statistics`` are those of ``input`` where the unit before returned them; with
        ``return_statistics`` the result comes with its own (None in evaluation, and where no unit
        of this arrangement takes them)."""
        wanted = return_statistics and self.training and self.takes_statistics
        if self._is_one_function():
            projection = self.shortcut
            assert projection is None or isinstance(projection, nn.Conv2d)
            run = folded_unit if self.folds else fused_unit
            output, found = run(
                input, self.layers(), projection, self.save_activation, statistics, wanted
            )
        else:
            output, found = self._run(input, statistics, wanted)
        return (output, found) if return_statistics else output

    def joins_its_like(self) -> bool:
        """Whether it may run together with units before and after it, as one function."""
        return (
            self.shortcut is None
            and not self.save_activation
            and self._is_one_function()
            and is_called_plainly(self)
        )

    def layers(self) -> list[Layer]:
        return list(zip(self.norms, self.convs, strict=True))

    def folded_norms(self) -> dict[nn.Module, str]:
        """Those that ``fold_`` folds into the convolutions before them, and when."""
        return dict.fromkeys(self.norms[1:] if self._is_one_function() else [], WHERE_FASTER)

    def _is_one_function(self) -> bool:
        """Whether ``functional.residual_unit`` is the whole of it."""
        return (
            self.arrangement.before == "norm_relu"
            and self.weighing is None
            and (
                self.projects_activation
                or (self.shortcut is None and not self.activate_before_split)
            )
        )

    def _run(
        self, input: Tensor, statistics: Statistics | None, wanted: bool
    ) -> tuple[Tensor, Statistics | None]:
        input, x, carried = self._open(input, statistics)
        shortcut, factor = carried, None
        if self.weighing is not None:
            shortcut, factor = self.weighing(input, carried)
        # Norms between the convolutions: those of full pre-activation stand one place further on.
        between = self.norms[1:] if self.takes_statistics else self.norms[:-1]
        wanted = self.training if self.arrangement.after == "norm_relu" else wanted
        joined = len(between) > 0 and self.arrangement.end == "" and factor is None
        found: Statistics | None = None
        for index, (norm, conv) in enumerate(zip(between, self.convs[1:], strict=True)):
            joins = joined and index == len(between) - 1
            (x,), found = linked_prefix(
                x, norm, [conv], shortcut if joins else None, self.save_activation, None,
                joins and wanted,
            )  # fmt: skip
        if self.arrangement.end == "norm_relu":
            x = fused_batch_norm_relu(self.norms[-1], x)
        elif self.arrangement.end == "norm":
            x = batch_norm(self.norms[-1], x)
        if not joined:
            x, found = _add(shortcut, x, factor, wanted)
        if self.arrangement.after == "norm_relu":
            return fused_batch_norm_relu(self.norms[-1], x, found), None
        return F.relu(x) if self.arrangement.after == "relu" else x, found

    def _open(self, input: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor, Tensor]:
        """The unit's input as the shortcut sees it, the first convolution's result, and what the
        shortcut carries."""
        first = self.convs[0]
        before = self.arrangement.before
        if self.activate_before_split and before:
            if before == "relu":
                input = F.relu(input)
            else:
                input = fused_batch_norm_relu(self.norms[0], input, statistics)
            before = ""
        if before == "norm_relu":
            together = [first]
            if self.projects_activation:
                assert isinstance(self.shortcut, nn.Conv2d)
                together.append(self.shortcut)
            (x, *projected), _ = linked_prefix(
                input, self.norms[0], together, None, self.save_activation, statistics
            )
            return input, x, projected[0] if projected else self._carry(input)
        activation = F.relu(input) if before == "relu" else input
        carried = self._carry(activation if self.projects_activation else input)
        return input, first(activation), carried

    def _carry(self, input: Tensor) -> Tensor:
        if isinstance(self.shortcut, nn.Sequential):
            projection, norm = self.shortcut
            assert isinstance(norm, BatchNorm)
            return batch_norm(norm, projection(input))
        return input if self.shortcut is None else self.shortcut(input)

    def extra_repr(self) -> str:
        order = next(name for name, value in UNITS.items() if value == self.arrangement)
        return f"unit={order}, shortcut={self.kind}"


def _add(
    shortcut: Tensor, branch: Tensor, factor: Factor, return_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    """``shortcut + factor * branch``, and the statistics of that."""
    if isinstance(factor, Tensor):
        return torch.addcmul(shortcut, factor, branch), None
    if factor is not None:
        return torch.add(shortcut, branch, alpha=factor), None
    found = functional.identity_add(branch, shortcut, return_statistics=return_statistics)
    return (found, None) if isinstance(found, Tensor) else found
