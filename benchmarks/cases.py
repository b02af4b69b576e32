"""One case (network, type, mode): parity first, then timing, then memory, for every lane."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch

from . import floor, memory, parity, timing
from .networks import Network
from .providers import BASELINE, PROVIDERS, Prepared, Provider
from .rows import FLOOR, Row
from .workload import (
    LAYOUTS,
    Batch,
    forward_backward,
    make_batch,
    make_step,
    settled_model,
    to_layout,
)

__all__ = ["Case", "Settings", "run_case"]

Notify = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How to measure, the same for every case of a run."""

    device: torch.device
    providers: Sequence[Provider]
    layouts: Sequence[str]
    rounds: int
    seconds: float
    batch_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Case:
    network: Network
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.network.name}, {self.dtype}, {self.mode}"


@dataclass
class _Lane:
    """A provider in one layout, on its own copy of the model."""

    row: Row
    provider: Provider | None
    batch: Batch | None = None
    prepared: Prepared | None = None
    first_call: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    step: Callable[[], None] | None = None

    def fail(self, error: BaseException) -> None:
        self.row.parity, self.row.note = "error", reason(error)
        self.prepared = self.step = None


def reason(error: BaseException) -> str:
    """One line about an exception, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = re.sub(r"(?:[A-Za-z]:)?[/\\][^\s'\",:;)]+", "…", text)
    return text if len(text) <= 160 else text[:159] + "…"


def run_case(case: Case, settings: Settings, notify: Notify = lambda text, done: None) -> list[Row]:
    """Measure one case and return one row a lane, eager first and the conv floor last.

    A lane that raises, or whose results are wrong, gets a row with the reason and no figures; the
    others go on. Eager itself is always run, since everything is compared with it.
    """
    notify("building", 0.0)
    batch = _batch(case, settings)
    context = _prepare_baseline(torch.nn.Identity(), case).context
    base = settled_model(case.network, batch, settings.seed, context)
    lanes = _prepare(base, batch, case, settings)
    notify("parity: reference", 0.0)
    reference = _reference(base, batch, case)
    for index, lane in enumerate(lanes):
        notify(f"parity: {lane.row.provider} {lane.row.layout}", index / len(lanes))
        _check(lane, lanes, case, reference)
    del base, reference
    lanes += _floors(lanes, case, notify)
    running = [lane for lane in lanes if _make_step(lane, case)]
    _time(running, settings, notify)
    _measure_memory(lanes, case, settings, notify)
    _release(settings)
    return [lane.row for lane in lanes]


def _batch(case: Case, settings: Settings) -> Batch:
    size = settings.batch_size or case.network.batch_size(settings.device.type)
    return make_batch(case.network, size, settings.device, settings.seed)


def _prepare_baseline(model: torch.nn.Module, case: Case) -> Prepared:
    return PROVIDERS[BASELINE].prepare(model, case.network, case.mode)


def _prepare(base: torch.nn.Module, batch: Batch, case: Case, settings: Settings) -> list[_Lane]:
    network = case.network
    chosen = [PROVIDERS[BASELINE], *(p for p in settings.providers if p.name != BASELINE)]
    lanes = []
    for provider in chosen:
        for layout in settings.layouts:
            row = Row(
                network.name,
                network.source,
                batch.images.shape[0],
                network.image_size,
                case.dtype,
                case.mode,
                provider.name,
                layout,
            )
            lane = _Lane(row, provider, batch.to(memory_format=LAYOUTS[layout]))
            try:
                model = to_layout(deepcopy(base), layout).train(case.mode == "training")
                lane.prepared = provider.prepare(model, network, case.mode)
                row.note = lane.prepared.note
            except Exception as error:  # a provider that cannot run is a result, not a crash
                lane.fail(error)
            lanes.append(lane)
    return lanes


def _reference(base: torch.nn.Module, batch: Batch, case: Case) -> parity.Snapshot:
    """The step in a wider type, from the same weights and images as every lane."""
    dtype = parity.REFERENCE_DTYPE[case.dtype]
    prepared = _prepare_baseline(deepcopy(base).to(dtype), case)
    return parity.run(prepared, batch.to(dtype), str(dtype), case.mode)


def _check(lane: _Lane, lanes: list[_Lane], case: Case, reference: parity.Snapshot) -> None:
    if lane.prepared is None or lane.provider is None or lane.batch is None:
        return
    begin = time.perf_counter()
    try:
        try:
            snapshot = parity.run(lane.prepared, lane.batch, case.dtype, case.mode)
        except Exception:
            if lane.prepared.fallback is None:
                raise
            lane.prepared = lane.prepared.fallback()
            lane.row.note = lane.prepared.note
            snapshot = parity.run(lane.prepared, lane.batch, case.dtype, case.mode)
    except Exception as error:  # shown in the lane's row
        lane.fail(error)
        return
    lane.first_call = time.perf_counter() - begin
    lane.errors = parity.compare(snapshot, reference)
    if lane.provider.name == BASELINE:
        lane.row.parity = "reference"
        return
    eager = [other.errors for other in lanes if other.row.parity == "reference"]
    if not eager:
        lane.row.parity, lane.row.note = "error", "eager did not run, so nothing to compare with"
        lane.prepared = None
        return
    outcome = parity.judge(lane.errors, eager, case.dtype)
    lane.row.margin = outcome.margin
    lane.row.parity = "passed" if outcome.passed else "FAILED"
    if not outcome.passed:
        lane.row.note = outcome.detail
        lane.prepared = None


def _floors(lanes: list[_Lane], case: Case, notify: Notify) -> list[_Lane]:
    """The conv floor in every layout that eager ran in."""
    floors = []
    for lane in lanes:
        if lane.row.parity != "reference" or lane.prepared is None or lane.batch is None:
            continue
        notify(f"recording convolutions: {lane.row.layout}", 0.0)
        prepared, batch = lane.prepared, lane.batch
        calls = floor.record(partial(forward_backward, prepared, batch, case.dtype, case.mode))
        if not calls:
            continue
        row = Row(*_identity(lane.row), FLOOR, lane.row.layout, note=f"{len(calls)} convolutions")
        floors.append(_Lane(row, None, step=floor.replay(calls)))
    return floors


def _identity(row: Row) -> tuple[str, str, int, int, str, str]:
    return row.network, row.source, row.batch_size, row.image_size, row.dtype, row.mode


def _make_step(lane: _Lane, case: Case) -> bool:
    """Give the lane its timed step and run it once; False if there is none or it raises."""
    if lane.prepared is not None and lane.batch is not None:
        lane.step = make_step(lane.prepared, lane.batch, case.dtype, case.mode)
    if lane.step is None:
        return False
    try:
        lane.step()
    except Exception as error:  # shown in the lane's row
        lane.fail(error)
        return False
    return True


def _time(lanes: list[_Lane], settings: Settings, notify: Notify) -> None:
    """Interleave the lanes, then fill in their times, faults and paired ratios."""
    steps = {index: lane.step for index, lane in enumerate(lanes) if lane.step is not None}
    if not steps:
        return
    notify("timing", 0.0)
    samples = timing.measure(
        steps,
        settings.device.type,
        settings.rounds,
        settings.seconds,
        on_round=lambda done: notify(f"timing: round {done}", done / settings.rounds),
    )
    for index, lane in enumerate(lanes):
        lane.row.rounds = len(samples[index].seconds)
        lane.row.step = timing.quantiles(samples[index].seconds, 0.2, 0.8)
        lane.row.faults = timing.quantiles(samples[index].faults, 0.0, 1.0).median
        if lane.provider is not None and lane.provider.compiles and lane.first_call is not None:
            lane.row.compile_seconds = max(0.0, lane.first_call - lane.row.step.median)
    best = _best_of_each_provider(lanes)
    for index, lane in enumerate(lanes):
        mine = samples[index]
        if BASELINE in best:
            lane.row.speedup = timing.paired(samples[best[BASELINE]], mine)
        if "compile" in best:
            lane.row.against_compile = timing.paired(samples[best["compile"]], mine)
        if FLOOR in best:
            lane.row.over_floor = timing.paired(mine, samples[best[FLOOR]])


def _best_of_each_provider(lanes: list[_Lane]) -> dict[str, int]:
    """Index of the layout with the lowest median, by provider; marks its row."""
    best: dict[str, int] = {}
    medians = [0.0 if lane.row.step is None else lane.row.step.median for lane in lanes]
    for index, lane in enumerate(lanes):
        name = lane.row.provider
        if name not in best or medians[index] < medians[best[name]]:
            best[name] = index
    for index in best.values():
        lanes[index].row.best = True
    return best


def _measure_memory(lanes: list[_Lane], case: Case, settings: Settings, notify: Notify) -> None:
    """Peak and saved bytes, each in a step of its own outside the timing."""
    for position, lane in enumerate(lanes):
        if lane.step is None or lane.prepared is None or lane.batch is None:
            continue
        notify(f"memory: {lane.row.provider} {lane.row.layout}", position / len(lanes))
        prepared, batch = lane.prepared, lane.batch
        try:
            prepared.module.zero_grad(set_to_none=True)
            lane.row.peak_bytes = memory.peak_bytes(lane.step, settings.device.type)
            if case.mode == "training":
                lane.row.saved_bytes = memory.saved_bytes(
                    partial(forward_backward, prepared, batch, case.dtype, case.mode),
                    prepared.module,
                )
        except Exception as error:  # the times stand; the note says why memory is missing
            lane.row.note = f"memory not measured: {reason(error)}"


def _release(settings: Settings) -> None:
    """Drop compiled code and cached blocks, so that one case does not weigh on the next."""
    if any(provider.compiles for provider in settings.providers):
        torch._dynamo.reset()
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
