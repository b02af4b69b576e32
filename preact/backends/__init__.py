"""Which implementation runs, and why.

Three backends share one set of op names: ``reference`` (eager PyTorch itself), ``cpp`` (the native
extension: C++ on the CPU, CUDA on GPUs) and ``triton``. The automatic choice takes a fused backend
where it has won and can run, and eager PyTorch elsewhere; ``use_backend`` and ``PREACT_BACKEND``
override it, by a backend's name or by ``fused``: the first of the device's ``PREFERENCE`` that can
run.
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
# Devices where nobody has to ask. The GPU kernels have never run on a GPU: until they have, and won
# there, nobody gets them unasked.
AUTOMATIC = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_log = logging.getLogger("preact")
_forced: str | None = None
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
    """Why no fused backend is chosen for a device by itself; empty where one is."""
    if device_type not in AUTOMATIC:
        return f"nothing was measured on {device_type} yet; PREACT_BACKEND asks for a backend"
    return _why_not_fused(device_type)


def _why_not_fused(device_type: str) -> str:
    """Empty where a fused backend can run on the device, else why each cannot."""
    names = PREFERENCE.get(device_type, ())
    reasons = [_why_not(name, device_type) for name in names]
    if not names:
        return f"no fused backend serves device type {device_type}"
    return "; ".join(reasons) if all(reasons) else ""


def _first_fused(device_type: str) -> str | None:
    names = PREFERENCE.get(device_type, ())
    return next((name for name in names if not _why_not(name, device_type)), None)


def cpu_capability() -> str:
    """Instruction set of the CPU kernels: "AVX512", "AVX2", "baseline", or "" without them."""
    return cpp.cpu_capability()


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
    global _forced
    if name not in (*NAMES, FUSED):
        raise ValueError(f"backend must be one of {', '.join((*NAMES, FUSED))}, got {name!r}")
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


# Nothing must load a library while a graph is traced.
@cpp.constant_to_compile
def _choose(forced: str | None, device_type: str) -> str:
    wanted = forced or _forced_by_environment()
    if wanted == FUSED:
        wanted = _first_fused(device_type)
        if wanted is None:
            raise RuntimeError(f"no fused backend: {_why_not_fused(device_type)}")
        return wanted
    if wanted is not None:
        reason = _why_not(wanted, device_type)
        if reason:
            raise RuntimeError(f"backend {wanted!r} cannot run on {device_type}: {reason}")
        return wanted
    if device_type in AUTOMATIC and (name := _first_fused(device_type)) is not None:
        return name
    if device_type not in _reported:
        _reported.add(device_type)
        _log.info("running eager PyTorch on %s: %s", device_type, why_eager(device_type))
    return "reference"


def choose(device_type: str) -> str:
    """The backend for a device; raises ``RuntimeError`` where a forced one cannot run."""
    return _choose(_forced, device_type)
