"""The paper's identities measured on a network: equations 3 to 6, for every shortcut.

The network runs as it is, on the fused kernels. Beside it every unit's branch ``F`` is computed
again from its own layers in eager PyTorch, so that

    x_L = (product of h) x_l + sum of F            (equations 4 and 6)
    dE/dx_l = the first term's part + the second's (equations 5 and 8)

compare two computations. Within a stage, dimensions stay: a stage's first unit is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preact.models import PreResNet, ResidualUnit
from preact.models.shortcuts import ConstantScaling, DropoutShortcut, Gating

__all__ = ["Stage", "UnitSignal", "measure"]


@dataclass
class UnitSignal:
    """One unit's input: root mean square of the signal, norms of its gradient and of its terms.

    ``direct`` is what the shortcuts alone bring of the stage's last gradient (for identities that
    gradient itself), ``through`` the rest of ``gradient``: what comes through the weights. Both are
    NaN in a stage's first unit.
    """

    unit: int
    stage: int
    signal: float
    gradient: float
    direct: float = float("nan")
    through: float = float("nan")


@dataclass
class Stage:
    """How far the two sides of the identities are apart over one stage, relative to the left."""

    stage: int
    signal_error: float
    gradient_error: float


@dataclass
class _Pass:
    """What one unit was given and what it drew, as the network ran."""

    unit: ResidualUnit
    input: Tensor
    seed: Tensor | None = None


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """With the batch's statistics, leaving the running ones alone."""
    assert isinstance(norm, nn.BatchNorm2d)
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def branch(unit: ResidualUnit, x: Tensor) -> Tensor:
    """``F(x)`` by the unit's own layers, one after another."""
    norms, convs = list(unit.norms), unit.convs
    before, end, _ = unit.arrangement
    if before == "norm_relu":
        for norm, conv in zip(norms, convs, strict=True):
            x = conv(torch.relu(_normalised(norm, x)))
        return x
    x = convs[0](torch.relu(x) if before == "relu" else x)
    for norm, conv in zip(norms[:-1], convs[1:], strict=True):
        x = conv(torch.relu(_normalised(norm, x)))
    if end:
        x = _normalised(norms[-1], x)
    return torch.relu(x) if end == "norm_relu" else x


def _after(unit: ResidualUnit, x: Tensor) -> Tensor:
    """``f``, which follows the addition."""
    if unit.arrangement.after == "norm_relu":
        x = _normalised(unit.norms[-1], x)
    return torch.relu(x) if unit.arrangement.after else x


class _Shortcut:
    """``h`` of one unit at one input, as a linear function, and the factor on the branch."""

    def __init__(self, at: _Pass, x: Tensor) -> None:
        self.unit = at.unit
        self.scale: Tensor | float = 1.0
        self.branch: Tensor | float = 1.0
        weighing = at.unit.weighing
        if isinstance(weighing, ConstantScaling):
            self.scale, self.branch = weighing.scale, weighing.branch_scale
        elif isinstance(weighing, Gating):
            gate = torch.sigmoid(weighing.conv(x))
            self.scale, self.branch = 1 - gate, gate if weighing.exclusive else 1.0
        elif isinstance(weighing, DropoutShortcut):
            assert at.seed is not None
            with torch.random.fork_rng():
                torch.set_rng_state(at.seed)
                self.scale = F.dropout(torch.ones_like(x), weighing.p)

    def __call__(self, vector: Tensor, constant: bool = False) -> Tensor:
        """``h`` applied to ``vector``; a gate as a constant, or as a function of its input."""
        if self.unit.shortcut is not None:
            vector = self.unit.shortcut(vector)
        constant = constant and isinstance(self.scale, Tensor)
        return (self.scale.detach() if constant else self.scale) * vector  # type: ignore[union-attr]


def _record(model: PreResNet, images: Tensor, labels: Tensor) -> list[list[_Pass]]:
    """One training step's forward and backward; the inputs of all units keep their gradients."""
    stages: list[list[_Pass]] = []
    handles = []
    for stage in model.stages:
        passes: list[_Pass] = []
        stages.append(passes)

        def enter(unit: nn.Module, inputs: Any, passes: list[_Pass] = passes) -> None:
            x: Tensor = inputs[0]
            x.retain_grad()
            assert isinstance(unit, ResidualUnit)
            passes.append(_Pass(unit, x))

        def draw(_: nn.Module, inputs: Any, passes: list[_Pass] = passes) -> None:
            passes[-1].seed = torch.get_rng_state()

        def leave(unit: nn.Module, _: Any, output: Any, passes: list[_Pass] = passes) -> None:
            output[0].retain_grad()
            assert isinstance(unit, ResidualUnit)
            passes.append(_Pass(unit, output[0]))

        for unit in stage:
            handles.append(unit.register_forward_pre_hook(enter))
            if unit.weighing is not None:
                handles.append(unit.weighing.register_forward_pre_hook(draw))
        handles.append(stage[-1].register_forward_hook(leave))
    F.cross_entropy(model(images), labels).backward()
    for handle in handles:
        handle.remove()
    return stages


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def _gradient(at: _Pass) -> Tensor:
    assert at.input.grad is not None
    return at.input.grad


def _segment(passes: Sequence[_Pass], signals: Sequence[UnitSignal], stage: int) -> Stage:
    """Both identities from ``passes[0]`` to the last, the output; fills in the signals' terms."""
    last = passes[-1]
    grad_last = _gradient(last)
    start = passes[0].input.detach().requires_grad_()
    x, constants, carried = start, [start], start
    total = torch.zeros_like(start)
    for at in passes[:-1]:
        shortcut = _Shortcut(at, x)
        part = shortcut.branch * branch(at.unit, x)
        total = shortcut(total) + part
        carried = shortcut(carried)
        constants.append(shortcut(constants[-1], constant=True))
        x = _after(at.unit, shortcut(x) + part)
    direct = torch.autograd.grad(constants[-1], constants, grad_last, retain_graph=True)
    through = torch.autograd.grad(total + (carried - constants[-1]), start, grad_last)[0]
    for at, signal, first_term in zip(passes, signals, direct, strict=False):
        signal.direct = _norm(first_term)
        signal.through = _norm(_gradient(at) - first_term)
    end, first = last.input.detach(), _gradient(passes[0])
    return Stage(
        stage,
        _norm(end - (constants[-1] + total)) / _norm(end),
        _norm(first - (direct[0] + through)) / _norm(first),
    )


def measure(
    model: PreResNet, images: Tensor, labels: Tensor
) -> tuple[list[UnitSignal], list[Stage]]:
    """Signals by unit and errors by stage, for one step in training mode.

    ``images`` ``[N, 3, H, W]`` in the model's type, ``labels`` ``[N]``. Stages of one unit have no
    error to show and are left out.
    """
    model.train()
    signals: list[UnitSignal] = []
    stages: list[Stage] = []
    for index, passes in enumerate(_record(model, images, labels)):
        own = [
            UnitSignal(
                len(signals) + i, index,
                _norm(at.input) / at.input.numel() ** 0.5, _norm(_gradient(at)),
            )
            for i, at in enumerate(passes[:-1])
        ]  # fmt: skip
        if len(passes) > 2:
            stages.append(_segment(passes[1:], own[1:], index))
        signals += own
    model.zero_grad(set_to_none=True)
    return signals, stages
