"""Which of a launcher's configurations runs: the written default, or the fastest one measured.

Each launcher offers a short tuple of configurations, the written default first. On a GPU the first
call of a shape class times them all, as ``cudnn.benchmark`` does, and the choice is kept in memory
and on disk, one file for each device and version. The default runs without measuring where

- ``PREACT_TUNE=off``, or ``torch.use_deterministic_algorithms`` is on (another configuration sums
  in another order);
- a CUDA graph is being captured and the shape class is new: measuring would synchronise;
- there is no GPU: in the interpreter.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from . import device as devices

Config = TypeVar("Config", bound=tuple[object, ...])
"""A named tuple of numbers: block sizes, warps, stages."""

WARM_UP, ROUNDS = 2, 7

_log = logging.getLogger("preact")
_chosen: dict[tuple[int, str, str], tuple[object, ...]] = {}


def cache_folder() -> Path:
    named = os.environ.get("PREACT_CACHE_DIR", "").strip()
    return Path(named) if named else Path.home() / ".cache" / "preact"


def cache_file(device: torch.device) -> Path:
    """One file for each kind of device and each version of what makes the code."""
    found = devices.properties(device)
    versions = "-".join(
        f"{name}{importlib.metadata.version(name)}" for name in ("torch", "triton", "preact")
    )
    name = f"{found.name}-sm_{found.capability}-{versions}.json"
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
    """Adds one choice; processes that write at once lose one of the two, never the file."""
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


def _may_measure(device: torch.device) -> bool:
    choice = os.environ.get("PREACT_TUNE", "auto")
    if choice not in ("auto", "off"):
        raise ValueError(f"PREACT_TUNE must be auto or off, got {choice!r}")
    return (
        device.type == "cuda"
        and choice == "auto"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def measure(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each of ``runs`` on the current CUDA stream, rounds interleaved."""
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


def is_known(op: str, key: str, device: torch.device) -> bool:
    """Whether ``select`` has a measured choice for this shape class, of this process or a file."""
    return _place(op, key, device) in _chosen


def _place(op: str, key: str, device: torch.device) -> tuple[int, str, str]:
    return (-1 if device.index is None else device.index, op, key)


def select(
    op: str,
    key: str,
    configs: Sequence[Config],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The configuration for a call of ``op`` in the shape class ``key``.

    ``configs`` are the choices, the written default first; ``launch`` runs the kernel with one.
    """
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    place = _place(op, key, device)
    known = _chosen.get(place)
    for config in configs:
        if config == known:
            return config
    if not _may_measure(device):
        return configs[0]
    path, entry = cache_file(device), f"{op} {key}"
    stored = tuple(_stored(path).get(entry, ()))
    for config in configs:
        if config == stored:
            _chosen[place] = config
            return config
    with torch.cuda.device(device):
        times = measure([functools.partial(launch, config) for config in configs])
    best = configs[times.index(min(times))]
    _chosen[place] = best
    _store(path, entry, best)
    return best
