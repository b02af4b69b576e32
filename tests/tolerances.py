"""Every tolerance of the test suite: the package's own rule, and those of whole networks."""

from __future__ import annotations

import torch
from torch import Tensor

from preact.accuracy import (
    EAGER_FACTOR,
    distance,
    error,
    floor,
    magnitude,
    mismatch,
)

__all__ = [
    "AUTOCAST",
    "EAGER_FACTOR",
    "NETWORK_FLOAT64",
    "assert_as_good_as_eager",
    "assert_same_in_float64",
    "distance",
    "error",
    "floor",
    "magnitude",
]

NETWORK_FLOAT64 = 1e-9
"""Relative distance of a whole network's results in float64, over some training steps."""
AUTOCAST = 2e-2
"""Relative distance under bfloat16 autocast, where eager itself rounds after every operation."""


def assert_same_in_float64(result: Tensor, reference: Tensor) -> None:
    """Two ways through a whole network, in float64: the same but for rounding."""
    assert result.dtype == reference.dtype == torch.float64
    found = distance(result, reference)
    assert found < NETWORK_FLOAT64, f"relative distance {found:.3g}"


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
    wrong = mismatch(name, result, eager, reference, terms)
    assert not wrong, wrong
