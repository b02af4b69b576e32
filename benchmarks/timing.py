"""Interleaved timing: every lane runs once a round, in an order that changes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

try:
    import resource
except ImportError:  # not a POSIX system: page faults cannot be counted
    resource = None  # type: ignore[assignment]

__all__ = ["Samples", "Spread", "clock", "measure", "page_faults", "paired", "quantiles"]

Key = TypeVar("Key", bound=Hashable)
SHORTEST_SAMPLE = 0.05  # seconds; shorter steps are repeated within a sample


@dataclass
class Samples:
    """One value a round: seconds for one step, and minor page faults for one step."""

    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """A median between two quantiles."""

    low: float
    median: float
    high: float


def page_faults() -> int:
    """Minor page faults of this process so far, all threads; 0 where they are not counted."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_clock(step: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def _cuda_clock(step: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / repeats


def clock(device_type: str) -> Callable[[Callable[[], None], int], float]:
    """Seconds a step for a number of repeats: events on CUDA, the wall clock elsewhere."""
    return _cuda_clock if device_type == "cuda" else _cpu_clock


def _order(keys: Sequence[Key], round_index: int) -> list[Key]:
    """Rotate by one each round, and run every other round backwards.

    Over two turns each lane stands in every place, and follows more than one neighbour: what a
    lane leaves behind in caches and in the allocator is not always met by the same other one.
    """
    shift = round_index // 2 % len(keys)
    turned = [*keys[shift:], *keys[:shift]]
    return turned[::-1] if round_index % 2 else turned


def measure(
    steps: Mapping[Key, Callable[[], None]],
    device_type: str,
    rounds: int,
    seconds: float,
    *,
    least_rounds: int = 5,
    on_round: Callable[[int], None] | None = None,
) -> dict[Key, Samples]:
    """Time the steps in turn; each sample index is one round, so samples pair up by index.

    Two warm-up rounds are run and dropped; the second tells how often a short step is repeated
    within a sample, the same for all. Stops after ``rounds``, or once ``seconds`` have passed and
    at least ``least_rounds`` (never more than ``rounds``) are there.
    """
    timer = clock(device_type)
    keys = list(steps)
    for key in keys:
        timer(steps[key], 1)
    fastest = min(timer(steps[key], 1) for key in keys)
    repeats = max(1, min(100, round(SHORTEST_SAMPLE / max(fastest, 1e-6))))
    result = {key: Samples() for key in keys}
    begin = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of one sample would count against that lane alone
    try:
        for round_index in range(rounds):
            for key in _order(keys, round_index):
                faults = page_faults()
                result[key].seconds.append(timer(steps[key], repeats))
                result[key].faults.append((page_faults() - faults) / repeats)
            if on_round is not None:
                on_round(round_index + 1)
            spent = time.perf_counter() - begin
            if round_index + 1 >= min(least_rounds, rounds) and spent > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return result


def quantiles(values: Sequence[float], low: float, high: float) -> Spread:
    """Median with two quantiles, given as fractions, interpolated between the samples."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    return Spread(at(low), statistics.median(ordered), at(high))


def paired(numerator: Samples, denominator: Samples) -> Spread:
    """Ratio of two lanes round by round: median and quartiles of the ratios."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return quantiles([a / b for a, b in pairs], 0.25, 0.75)
