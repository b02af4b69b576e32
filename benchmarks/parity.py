"""Same results first: no provider gets a speed figure before its results are compared.

A step is run from the same weights and images as an eager run in a wider type (float64 for
float32, float32 for bfloat16 autocast). The error of a provider may be at most twice the error of
eager PyTorch in the same type, in its worse layout, plus a floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import Prepared
from .workload import Batch, forward_backward

__all__ = ["FACTOR", "FLOOR", "REFERENCE_DTYPE", "Parity", "Snapshot", "compare", "judge", "run"]

FACTOR = 2.0
# Relative errors that are accepted however exact eager happens to be.
FLOOR = {"float32": 2e-6, "bfloat16": 2e-3}
REFERENCE_DTYPE = {"float32": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Snapshot:
    """The results of one step: the logits and, when training, loss, gradients and statistics."""

    logits: Tensor
    loss: Tensor | None
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison.

    Attributes:
        passed: every error is within its allowance.
        margin: the largest error divided by its allowance; at most 1 when passed.
        detail: the quantity that comes nearest to its allowance, with both figures.
    """

    passed: bool
    margin: float
    detail: str


def run(prepared: Prepared, batch: Batch, dtype: str, mode: str) -> Snapshot:
    """Run one step of ``prepared`` and copy its results.

    ``dtype`` other than "bfloat16" runs without autocast, in the type of the model.
    """
    prepared.module.train(mode == "training")
    logits, loss = forward_backward(prepared, batch, dtype, mode)
    if mode == "inference":
        return Snapshot(logits.detach().clone(), None, {}, {})
    gradients = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in prepared.module.named_parameters()
        if p.requires_grad
    }
    buffers = {name: b.detach().clone() for name, b in prepared.module.named_buffers()}
    prepared.module.zero_grad(set_to_none=True)
    return Snapshot(logits.detach(), None if loss is None else loss.detach(), gradients, buffers)


def _difference(actual: Tensor | None, expected: Tensor | None) -> tuple[float, float, int]:
    """Norm of the difference, norm of the expected value, number of elements."""
    if expected is None or actual is None:
        return (0.0 if expected is actual else math.inf), 0.0, 1
    if actual.shape != expected.shape:
        return math.inf, 0.0, 1
    wide = expected.double()
    difference = torch.linalg.vector_norm(actual.double() - wide).item()
    return difference, torch.linalg.vector_norm(wide).item(), max(1, wide.numel())


def _relative(parts: Iterable[tuple[float, float, int]]) -> tuple[float, float]:
    """Relative error of all parts together, and of the worst part alone.

    A part whose expected value is next to nothing, as the gradient of a bias in front of a batch
    norm, is measured against a thousandth of the overall root mean square instead.
    """
    parts = list(parts)
    error = math.sqrt(sum(d * d for d, _, _ in parts))
    norm = math.sqrt(sum(e * e for _, e, _ in parts))
    if not parts or error == 0.0:
        return 0.0, 0.0
    mean_square = norm * norm / sum(n for _, _, n in parts)
    worst = 0.0
    for part_error, expected, count in parts:
        scale = max(expected, 1e-3 * math.sqrt(mean_square * count))
        part = part_error / scale if scale > 0.0 else part_error
        # max() would drop a NaN that comes second.
        worst = part if math.isnan(part) else max(worst, part)
        if math.isnan(worst):
            break
    return (error / norm if norm > 0.0 else error), worst


def compare(actual: Snapshot, expected: Snapshot) -> dict[str, float]:
    """Relative errors of ``actual``, by quantity."""
    errors = {"logits": _relative([_difference(actual.logits, expected.logits)])[0]}
    if expected.loss is None:
        return errors
    errors["loss"] = _relative([_difference(actual.loss, expected.loss)])[0]
    errors["gradients"], errors["worst gradient"] = _relative(
        _difference(actual.gradients.get(name), value) for name, value in expected.gradients.items()
    )
    # Means and variances of different sizes: the worst one says more than all together.
    errors["running statistics"] = _relative(
        _difference(actual.buffers.get(name), value) for name, value in expected.buffers.items()
    )[1]
    return errors


def judge(errors: Mapping[str, float], eager: Iterable[Mapping[str, float]], dtype: str) -> Parity:
    """Hold the errors of a provider against those of eager, one mapping for each eager layout."""
    eager = list(eager)
    margin, detail = -1.0, ""
    for quantity, error in errors.items():
        allowed = FACTOR * max(e[quantity] for e in eager) + FLOOR[dtype]
        ratio = error / allowed if math.isfinite(error) else math.inf
        if ratio > margin:
            margin, detail = ratio, f"{quantity}: error {error:.2g}, allowed {allowed:.2g}"
    return Parity(margin <= 1.0, margin, detail)
