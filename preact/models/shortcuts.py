"""The shortcuts of the paper's section 3: what a unit's two paths carry before their addition.

A ``Shortcut`` says which; ``build`` makes its module. The module takes the unit's input and what
the shortcut carries of it (the input itself, or where dimensions change what options A and B make
of it), and returns the shortcut's part of the sum and the factor on the branch, None for 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factor = Tensor | float | None


@dataclass(frozen=True)
class Shortcut:
    """One row of the paper's Table 1; the functions below make them.

    Attributes:
        kind: a key of ``SHORTCUTS``.
        scale: constant factor on the shortcut.
        branch_scale: constant factor on the branch.
        bias: initial bias of the gate.
        p: probability that dropout zeroes an element.
    """

    kind: str
    scale: float = 1.0
    branch_scale: float = 1.0
    bias: float = 0.0
    p: float = 0.0

    def __str__(self) -> str:
        return self.kind + {
            "constant_scaling": f"({self.scale:g}, {self.branch_scale:g})",
            "exclusive_gating": f"({self.bias:g})",
            "shortcut_only_gating": f"({self.bias:g})",
            "dropout": f"({self.p:g})",
        }.get(self.kind, "")


def identity() -> Shortcut:
    """``x + F(x)``."""
    return Shortcut("identity")


def constant_scaling(shortcut: float = 0.5, branch: float = 0.5) -> Shortcut:
    """``shortcut * x + branch * F(x)``; 0 and 1 make a plain network."""
    return Shortcut("constant_scaling", shortcut, branch)


def exclusive_gating(bias: float = -6.0) -> Shortcut:
    """``(1 - g(x)) x + g(x) F(x)``, with ``g`` the sigmoid of a 1x1 convolution with ``bias``."""
    return Shortcut("exclusive_gating", bias=bias)


def shortcut_only_gating(bias: float = -6.0) -> Shortcut:
    """``(1 - g(x)) x + F(x)``."""
    return Shortcut("shortcut_only_gating", bias=bias)


def convolution() -> Shortcut:
    """``W x + F(x)``, with ``W`` a 1x1 convolution, in every unit."""
    return Shortcut("convolution")


def dropout(p: float = 0.5) -> Shortcut:
    """``dropout(x) + F(x)``."""
    return Shortcut("dropout", p=p)


SHORTCUTS = {
    function.__name__: function
    for function in (
        identity, constant_scaling, exclusive_gating, shortcut_only_gating, convolution, dropout,
    )
}  # fmt: skip


def named(shortcut: str | Shortcut) -> Shortcut:
    """A ``Shortcut``, or the one of that name with its defaults. Raises ``ValueError``."""
    if isinstance(shortcut, Shortcut):
        return shortcut
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
    return SHORTCUTS[shortcut]()


class ConstantScaling(nn.Module):
    def __init__(self, scale: float, branch_scale: float) -> None:
        super().__init__()
        self.scale, self.branch_scale = scale, branch_scale

    def forward(self, input: Tensor, carried: Tensor) -> tuple[Tensor, Factor]:
        return self.scale * carried, None if self.branch_scale == 1 else self.branch_scale

    def extra_repr(self) -> str:
        return f"{self.scale:g}, {self.branch_scale:g}"


class Gating(nn.Module):
    """``g = sigmoid(conv(input))``: ``(1 - g) * carried``, and ``g`` on the branch if exclusive.

    Where dimensions change, the gate's convolution has the unit's own channels and stride, and
    works on what options A and B make of the input.
    """

    def __init__(self, channels: tuple[int, int], stride: int, bias: float, exclusive: bool):
        super().__init__()
        self.conv = nn.Conv2d(*channels, 1, stride)
        assert self.conv.bias is not None
        nn.init.constant_(self.conv.bias, bias)
        self.exclusive = exclusive

    def forward(self, input: Tensor, carried: Tensor) -> tuple[Tensor, Factor]:
        gate = torch.sigmoid(self.conv(input))
        return (1 - gate) * carried, gate if self.exclusive else None

    def extra_repr(self) -> str:
        return f"exclusive={self.exclusive}"


class DropoutShortcut(nn.Dropout):
    def forward(self, input: Tensor, carried: Tensor) -> tuple[Tensor, Factor]:  # type: ignore[override]
        return super().forward(carried), None


def build(shortcut: Shortcut, channels: tuple[int, int], stride: int) -> nn.Module | None:
    """The module for a unit from and to ``channels``; None where the sum takes ``carried``."""
    if shortcut.kind == "constant_scaling":
        return ConstantScaling(shortcut.scale, shortcut.branch_scale)
    if shortcut.kind in ("exclusive_gating", "shortcut_only_gating"):
        exclusive = shortcut.kind == "exclusive_gating"
        return Gating(channels, stride, shortcut.bias, exclusive)
    if shortcut.kind == "dropout":
        return DropoutShortcut(shortcut.p)
    return None


class ZeroPad(nn.Module):
    """Option A (He et al. 2015): every ``stride``-th pixel, the new channels zero."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, input: Tensor) -> Tensor:
        step = self.stride
        return F.pad(input[:, :, ::step, ::step], (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"{self.new_channels}, stride={self.stride}"
