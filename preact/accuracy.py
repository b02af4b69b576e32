"""When a result is right: the rule of the tests, and of the proof before a backend is chosen.

A fused result is judged against a float64 reference: its error may be at most twice that of eager
PyTorch in the same type, plus a floor. The floor is a few units in the last place of the largest
number that went into the result: of the reference itself, or, for a gradient, of the incoming
gradient where its terms cancel (two values per channel leave a batch norm's gradient near zero, and
what is left is rounding). For float64 results the reference is no better than what it judges, and
the floor is wider.

This module imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
FLOOR_ULPS = 8.0
FLOOR_ULPS_FLOAT64 = 64.0


def error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in float64. NaN counts as infinite."""
    difference = (result.detach().double() - reference.detach().double()).abs()
    return float(torch.nan_to_num(difference, nan=torch.inf).max()) if difference.numel() else 0.0


def magnitude(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0


def distance(result: Tensor, reference: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    difference = result.detach().double() - reference.detach().double()
    return float(difference.norm() / reference.detach().double().norm())


def floor(result: Tensor, reference: Tensor, terms: float = 0.0, eps: float | None = None) -> float:
    """``terms``: the magnitude of what was summed, where that exceeds the sum.

    ``eps``: of the type that was computed in, where that is coarser than the result's.
    """
    info = torch.finfo(result.dtype)
    ulps = FLOOR_ULPS_FLOAT64 if result.dtype == torch.float64 else FLOOR_ULPS
    return ulps * (eps or info.eps) * max(magnitude(reference), terms, info.tiny)


def mismatch(
    name: str,
    result: Tensor,
    eager: Tensor,
    reference: Tensor,
    terms: float = 0.0,
    eps: float | None = None,
) -> str:
    """Empty where ``result`` is as close to ``reference`` as eager is, to factor and floor."""
    if (result.dtype, result.shape) != (eager.dtype, eager.shape):
        found = f"{result.dtype} {tuple(result.shape)}"
        return f"{name}: {found}, eager's is {eager.dtype} {tuple(eager.shape)}"
    bound = EAGER_FACTOR * error(eager, reference) + floor(result, reference, terms, eps)
    if error(result, reference) <= bound:
        return ""
    return (
        f"{name}: error {error(result, reference):.3g}, eager's {error(eager, reference):.3g},"
        f" allowed {bound:.3g}"
    )
