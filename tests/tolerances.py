"""Every tolerance of the test suite, in one place.

A fused result is judged against a float64 reference: its error may be at most twice that of eager
PyTorch in the same type, plus a floor. The floor is a few units in the last place of the largest
number that went into the result: of the reference itself, or, for a gradient, of the incoming
gradient where its terms cancel (two values per channel leave a batch norm's gradient near zero, and
what is left is rounding). For float64 results the reference is no better than what it judges, and
the floor is wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
FLOOR_ULPS = 8.0
FLOOR_ULPS_FLOAT64 = 64.0
NETWORK_FLOAT64 = 1e-9
"""Relative distance of a whole network's results in float64, over some training steps."""
AUTOCAST = 2e-2
"""Relative distance under bfloat16 autocast, where eager itself rounds after every operation."""


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


def assert_same_in_float64(result: Tensor, reference: Tensor) -> None:
    """Two ways through a whole network, in float64: the same but for rounding."""
    assert result.dtype == reference.dtype == torch.float64
    found = distance(result, reference)
    assert found < NETWORK_FLOAT64, f"relative distance {found:.3g}"


def floor(result: Tensor, reference: Tensor, terms: float = 0.0) -> float:
    """``terms``: the magnitude of what was summed, where that exceeds the sum."""
    info = torch.finfo(result.dtype)
    ulps = FLOOR_ULPS_FLOAT64 if result.dtype == torch.float64 else FLOOR_ULPS
    return ulps * info.eps * max(magnitude(reference), terms, info.tiny)


def assert_as_good_as_eager(
    name: str,
    result: Tensor | None,
    eager: Tensor | None,
    reference: Tensor | None,
    terms: float = 0.0,
) -> None:
    """``result`` is as close to the float64 ``reference`` as eager is, to factor and floor."""
    assert (result is None) == (eager is None) == (reference is None), name
    if result is None or eager is None or reference is None:
        return
    assert result.dtype == eager.dtype, name
    assert result.shape == eager.shape, name
    bound = EAGER_FACTOR * error(eager, reference) + floor(result, reference, terms)
    assert error(result, reference) <= bound, (
        f"{name}: error {error(result, reference):.3g}, eager's {error(eager, reference):.3g},"
        f" allowed {bound:.3g}"
    )
