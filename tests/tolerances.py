"""Every tolerance of the test suite: the package's own rule, and those of whole networks."""

from __future__ import annotations

import statistics
from collections import defaultdict

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
    "Runs",
    "assert_as_good_as_eager",
    "assert_same_in_float64",
    "distance",
    "error",
    "floor",
    "magnitude",
    "seeds",
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


def seeds(dtype: torch.dtype) -> range:
    """Of the runs to take: where the roundings of bfloat16 fall elsewhere than eager's, a single
    run is by chance up to 2.3 times as far from float64 as eager's, or less."""
    return range(9 if dtype == torch.bfloat16 else 1)


class Runs:
    """The same computation of several seeds: judged as one run is, by medians.

    Where single values decide how far a run is from float64 (a norm that divides by next to
    nothing, an element whose z rounds to the other side of zero), either way may by chance be
    several times as far from it as the other, up to 10 times in 30 seeds. A single run that is a
    hundred times as far is no chance.
    """

    SINGLE_FACTOR = 100.0

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[float, float, float]]] = defaultdict(list)

    def add(
        self, name: str, result: Tensor, eager: Tensor, reference: Tensor, terms: float = 0.0
    ) -> None:
        ours, theirs = error(result, reference), error(eager, reference)
        allowed = floor(result, reference, terms)
        assert ours <= self.SINGLE_FACTOR * theirs + allowed, (name, ours, theirs, allowed)
        self._runs[name].append((ours, theirs, allowed))

    def assert_as_good_as_eager(self) -> None:
        assert self._runs
        for name, runs in self._runs.items():
            ours, eager, allowed = (statistics.median(of) for of in zip(*runs, strict=True))
            assert ours <= EAGER_FACTOR * eager + allowed, (name, ours, eager, allowed)
