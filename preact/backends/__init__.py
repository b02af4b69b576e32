"""Which implementation runs, and why.

Three backends share one set of op names: ``reference`` (eager PyTorch itself), ``cpp`` (the native
extension: C++ on the CPU, CUDA on GPUs) and ``triton``. The automatic choice takes the fused
backend on devices of ``AUTOMATIC``, where it has won wherever it was measured; on those of
``MEASURED`` it is ``AUTO``: ``choice`` decides each problem by proof and measurement on the device
itself. Eager PyTorch runs elsewhere. ``use_backend`` and ``PREACT_BACKEND`` override it, by a
backend's name or by ``fused``: the first of the device's ``PREFERENCE`` that can run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import cpp, triton

NAMES = ("reference", "cpp", "triton")
FUSED = "fused"
# Fused backends of a device, the better first: CUDA kernels start without a compilation at the
# first call and move 16 bytes an access in every streaming pass; Triton serves where they are not
# built.
PREFERENCE = {"cpu": ("cpp",), "cuda": ("cpp", "triton")}
AUTO = "auto"
AUTOMATIC = ("cpu",)
# The GPU kernels have never run on a GPU of ours: nobody gets them before they were right, and
# faster than eager PyTorch, on his own.
MEASURED = ("cuda",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_log = logging.getLogger("preact")
forced: str | None = None
"""By ``use_backend``."""
_reported: set[str] = set()


def _forced_by_environment() -> str | None:
    name = os.environ.get("PREACT_BACKEND", "").strip()
    if name in ("", "auto"):
        return None
    if name not in (*NAMES, FUSED):
        allowed = ", ".join((*NAMES, FUSED))
        raise ValueError(f"PREACT_BACKEND must be one of {allowed} or auto, got {name!r}")
    return name


def _why_not(name: str, device_type: str) -> str:
    """Empty where the backend can run on the device, else the reason why not."""
    if name == "reference":
        return ""
    if name == "cpp":
        return cpp.why_not(device_type)
    if name == "triton":
        return triton.why_not(device_type)
    raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")


def available(device_type: str = "cpu") -> dict[str, str]:
    """Each backend's name with the reason why it cannot run on the device, empty where it can."""
    return {name: _why_not(name, device_type) for name in NAMES}


def why_eager(device_type: str) -> str:
    """Why no fused backend is ever chosen for a device by itself; empty where one may be."""
    names = PREFERENCE.get(device_type, ())
    reasons = [_why_not(name, device_type) for name in names]
    if not names:
        return f"no fused backend serves device type {device_type}"
    return "; ".join(reasons) if all(reasons) else ""


def fused(device_type: str) -> list[str]:
    """Fused backends that can run on the device, the preferred one first."""
    return [name for name in PREFERENCE.get(device_type, ()) if not _why_not(name, device_type)]


def cpu_capability() -> str:
    """Instruction set of the CPU kernels: "AVX512", "AVX2", "baseline", or "" without them."""
    return cpp.cpu_capability()


def cpu_caches() -> tuple[int, int] | None:
    """Bytes of one core's data caches, first and second level, that the C++ CPU kernels make their
    blocks for; None where nothing is built."""
    return cpp.cpu_caches()


def table(name: str) -> Any:
    """The ops of a fused backend, as attributes under the names of ``preact.ops.SCHEMAS``."""
    if name == "cpp":
        return torch.ops.preact
    if name == "triton":
        return torch.ops.preact_triton
    raise ValueError(f"backend {name!r} has no table of ops")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside the block on one backend, whatever the device's automatic choice.

    ``name`` is ``"reference"``, ``"cpp"``, ``"triton"``, or ``"fused"`` for the first of the last
    two that can run: CUDA kernels where they are built, else Triton.
    The setting is the process's, not the thread's. A call whose device the backend cannot serve
    raises ``RuntimeError`` with the reason; an unknown name raises ``ValueError`` at once.
    """
    global forced
    if name not in (*NAMES, FUSED):
        raise ValueError(f"backend must be one of {', '.join((*NAMES, FUSED))}, got {name!r}")
    before = forced
    forced = name
    try:
        yield
    finally:
        forced = before


def is_automatic() -> bool:
    """Whether nobody asked for a backend."""
    return forced is None and _forced_by_environment() is None


# Nothing must load a library while a graph is traced.
@cpp.constant_to_compile
def _choose(forced: str | None, device_type: str) -> str:
    wanted = forced or _forced_by_environment()
    if wanted == FUSED:
        names = fused(device_type)
        if not names:
            raise RuntimeError(f"no fused backend: {why_eager(device_type)}")
        return names[0]
    if wanted is not None:
        reason = _why_not(wanted, device_type)
        if reason:
            raise RuntimeError(f"backend {wanted!r} cannot run on {device_type}: {reason}")
        return wanted
    if device_type in (*AUTOMATIC, *MEASURED) and (names := fused(device_type)):
        return names[0] if device_type in AUTOMATIC else AUTO
    if device_type not in _reported:
        _reported.add(device_type)
        _log.info("running eager PyTorch on %s: %s", device_type, why_eager(device_type))
    return "reference"


def choose(device_type: str) -> str:
    """The backend for a device, ``AUTO`` where that is decided for each problem.

    Raises ``RuntimeError`` where a forced one cannot run.
    """
    return _choose(forced, device_type)
