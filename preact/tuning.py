"""Choices by measurement: what may be timed when, the timing, and where its results are kept.

Whoever has a choice offers a short tuple of configurations, the written default first. The first
call of a shape class times them all, as ``cudnn.benchmark`` does, and the fastest is kept in memory
and on disk, one file for each device and version. The written default runs without measuring where

- ``PREACT_TUNE=off``, or ``torch.use_deterministic_algorithms`` is on (another configuration sums
  in another order);
- a CUDA graph is being captured and the shape class is new: measuring would synchronise;
- kernels run in Triton's interpreter, or inside ``paused``.

Kernels only write tensors that their launcher has just allocated, so that running them again, for
measuring, changes nothing. ``PREACT_CACHE_DIR`` names the folder, ``~/.cache/preact`` otherwise.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from . import device as devices

Config = TypeVar("Config", bound=tuple[object, ...])
"""A named tuple of numbers: block sizes, warps, stages."""

WARM_UP, ROUNDS = 2, 7
CPU_WARM_UP, CPU_ROUNDS, CPU_MOST_ROUNDS, CPU_MILLISECONDS = 2, 5, 15, 40.0
CPU_SECONDS = 3.0
"""That a process spends on measuring on its CPU, unless asked for more by ``PREACT_TUNE``."""
SETTINGS = ("auto", "off", "measure")

_log = logging.getLogger("preact")
_chosen: dict[tuple[int, str, str], tuple[object, ...]] = {}
_thread = threading.local()
_writing = threading.Lock()


def cache_folder() -> Path:
    named = os.environ.get("PREACT_CACHE_DIR", "").strip()
    if named:
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:  # a container's user may have none
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "preact"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cache_file(device: torch.device) -> Path:
    """One file for each kind of device and each version of what makes the code."""
    versions = "-".join(f"{name}{_version(name)}" for name in ("torch", "triton", "preact"))
    name = f"{devices.description(device)}-{versions}.json"
    return cache_folder() / re.sub(r"[^\w.+-]+", "_", name)


@functools.cache
def _stored(path: Path) -> dict[str, list[object]]:
    """What an earlier process measured; nothing where the file is absent or not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _store(path: Path, entry: str, config: Sequence[object]) -> None:
    """Adds one choice; processes that write at once lose one of the two, never the file.

    Threads lose none: autograd runs backward in one for each device.
    """
    with _writing:
        _stored.cache_clear()
        content = {**_stored(path), entry: list(config)}
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=0, sort_keys=True), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            _log.info("the tuning result is not kept: %s", error)
        _stored.cache_clear()


def setting() -> str:
    """``PREACT_TUNE``: "auto", "off", or "measure", which on CPUs measures without the limits of
    "auto", on small work and for as long as it takes."""
    choice = os.environ.get("PREACT_TUNE", "auto")
    if choice not in SETTINGS:
        raise ValueError(f"PREACT_TUNE must be one of {', '.join(SETTINGS)}, got {choice!r}")
    return choice


def why_not(device: torch.device) -> str:
    """Empty where measuring is allowed now, else why not."""
    if setting() == "off":
        return "PREACT_TUNE=off"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    if is_paused():
        return "measuring is paused"
    return "a CUDA graph is being captured" if capturing(device) else ""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, where nothing may synchronise."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_paused() -> bool:
    return getattr(_thread, "paused", False)


@contextmanager
def paused() -> Iterator[None]:
    """Written defaults, unless measured before, for this thread's calls inside the block."""
    before = is_paused()
    _thread.paused = True
    try:
        yield
    finally:
        _thread.paused = before


def measure(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median milliseconds of each of ``runs``, rounds interleaved, on the current CUDA stream or by
    the clock."""
    if device.type != "cuda":
        return _measure_by_clock(runs)
    for run in runs:
        for _ in range(WARM_UP):
            run()
    samples: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, sample in zip(runs, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            sample.append((start, stop))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in sample) for sample in samples]


def _measure_by_clock(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The shorter the runs, the more rounds: between some limits as many as take so long."""
    samples: list[list[float]] = []
    rounds = CPU_WARM_UP
    while len(samples) < rounds:
        sample = []
        for run in runs:
            start = time.perf_counter()
            run()
            sample.append(1e3 * (time.perf_counter() - start))
        samples.append(sample)
        if len(samples) == CPU_WARM_UP:
            fitting = int(CPU_MILLISECONDS / sum(sample))
            rounds += min(max(fitting, CPU_ROUNDS), CPU_MOST_ROUNDS)
    return [statistics.median(sample) for sample in zip(*samples[CPU_WARM_UP:], strict=True)]


def _place(op: str, key: str, device: torch.device) -> tuple[int, str, str]:
    return (-1 if device.index is None else device.index, f"{device.type} {op}", key)


def kept(op: str, key: str, device: torch.device) -> tuple[object, ...] | None:
    """What was measured for this shape class, by this process or, where measuring is allowed, by
    one before; None where that is nothing."""
    known = _chosen.get(_place(op, key, device))
    if known is None and not why_not(device):
        known = stored(op, device).get(key)
    return known


def stored(op: str, device: torch.device) -> dict[str, tuple[object, ...]]:
    """What processes before this one kept of ``op``, by shape class."""
    entries = _stored(cache_file(device)).items()
    return {
        entry[len(op) + 1 :]: tuple(value)
        for entry, value in entries
        if entry.startswith(f"{op} ") and isinstance(value, list)
    }


def recall(op: str, key: str, configs: Sequence[Config], device: torch.device) -> Config | None:
    """What is ``kept``; None where that is no longer one of ``configs``."""
    known = kept(op, key, device)
    for config in configs:
        if config == known:
            _chosen[_place(op, key, device)] = config
            return config
    return None


def remember(op: str, key: str, config: tuple[object, ...], device: torch.device) -> None:
    """Keeps what was measured, for this process and those after it."""
    _chosen[_place(op, key, device)] = config
    _store(cache_file(device), f"{op} {key}", config)


def select(
    op: str,
    key: str,
    configs: Sequence[Config],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The configuration for a call of ``op`` in the shape class ``key``, on a GPU.

    ``configs`` are the choices, the written default first; ``launch`` runs the kernel with one. One
    that raises, as where a device has less shared memory than its kind, is left out.
    """
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    known = recall(op, key, configs, device)
    if known is not None:
        return known
    if why_not(device):
        return configs[0]
    failed: list[Config] = []

    def attempt(config: Config) -> None:
        if config in failed:
            return
        try:
            launch(config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compilation or a launch raises
            _log.warning("%s cannot run with %s: %s", op, config, error)
            failed.append(config)

    with torch.cuda.device(device):
        times = measure([functools.partial(attempt, config) for config in configs], device)
    ranked = sorted(zip(times, range(len(configs)), strict=True))
    for _, index in ranked:
        if configs[index] not in failed:
            remember(op, key, configs[index], device)
            return configs[index]
    return configs[0]


def is_known(op: str, key: str, device: torch.device) -> bool:
    """Whether this process has a measured choice for this shape class, its own or a file's."""
    return _place(op, key, device) in _chosen
