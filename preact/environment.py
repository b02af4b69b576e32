"""What is installed, built and usable here, and why not: ``python -m preact.environment``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import preact
from preact import backends, choice, folded_choice, plans, tuning
from preact.backends import cpp
from preact.device import processor

_LIBRARIES = {"_C": "C++ kernels", "_C_cuda": "CUDA kernels"}
_VARIABLES = (
    "PREACT_BACKEND",
    "PREACT_BUILD",
    "PREACT_CACHE_DIR",
    "PREACT_CONV",
    "PREACT_CPU_CACHES",
    "PREACT_CPU_CAPABILITY",
    "PREACT_PLAN",
    "PREACT_SMALL_MAP",
    "PREACT_TUNE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)


def report() -> dict[str, str]:
    """Versions, what was built, what is usable and why not, by title, in printing order.

    Looks without side effects but one: it loads the native libraries, to tell whether they load.
    It does not import Triton.
    """
    rows = _versions()
    record = _build_record()
    for name, title in _LIBRARIES.items():
        rows[title] = _library(name, record)
    for device in ("cpu", "cuda"):
        for backend, reason in backends.available(device).items():
            reason = reason or _no_device(device)
            rows[f"{backend} on {device}"] = f"not usable: {reason}" if reason else "usable"
    rows["automatic choice"] = _automatic()
    rows |= _kept()
    rows["instruction set"] = backends.cpu_capability() or "none in use: no C++ kernels are loaded"
    rows["caches"] = _caches()
    rows["threads"] = f"{torch.get_num_threads()} of {_processors()} processors"
    rows["variables"] = ", ".join(f"{v}={os.environ[v]}" for v in _VARIABLES if v in os.environ)
    rows["variables"] = rows["variables"] or "none set that matter here"
    return rows


def _versions() -> dict[str, str]:
    return {
        "preact": f"{preact.__version__} in {Path(preact.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "PyTorch": torch.__version__,
        "Triton": _installed("triton"),
        "CUDA": _cuda(),
        "nvcc": _nvcc(),
        "processor": processor(),
    }


def _caches() -> str:
    found = backends.cpu_caches()
    if found is None:
        return "not asked for: no C++ kernels are loaded"
    first, second = (f"{size // 1024} KiB" for size in found)
    return f"blocks are made for {first} of the first level, {second} of the second"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: this PyTorch is built without CUDA"
    built = f"PyTorch is built for {torch.version.cuda}"
    if not torch.cuda.is_available():
        return f"{built}; no usable GPU was found"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    names = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    return f"{built}; {names}"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    command = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    path = shutil.which(command)
    if path is None:
        return f"not found ({command})"
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    release = re.search(r"release ([\d.]+)", answer.stdout)
    return f"{release.group(1)} ({path})" if release else f"{path} does not tell its version"


def _processors() -> int:
    """Those this process may run on, fewer than the machine's in many containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _build_record() -> dict[str, Any]:
    """What setup.py noted beside the package; empty in a tree that it never built."""
    path = Path(preact.__file__).with_name("_build.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _library(name: str, record: dict[str, Any]) -> str:
    path = cpp.native_path(name)
    if path is None:
        reason = record.get("reasons", {}).get(name)
        return f"not built: {reason or 'setup.py has not built this package'}"
    # A library that needs one which is not there (CUDA's, on a CPU-only PyTorch) fails to load.
    reason = cpp.load(name)
    if reason:
        return f"built, not usable: {reason}"
    with_torch = f" with PyTorch {record['torch']}" if "torch" in record else ""
    if name == "_C_cuda" and "architectures" in record:
        with_torch += f" for {record['architectures']}"
    return f"built{with_torch}, loaded from {path.name}"


def _no_device(device: str) -> str:
    return "no usable GPU was found" if device == "cuda" and not torch.cuda.is_available() else ""


def _automatic() -> str:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = []
    for device in devices:
        try:
            chosen.append(f"{backends.choose(device)} on {device}")
        except (RuntimeError, ValueError) as error:  # a forced backend that cannot run
            chosen.append(f"{device}: {error}")
    return ", ".join(chosen)


def choices(device_type: str) -> list[str]:
    """What was chosen on a device in this process, and why: backends, then convolutions."""
    chosen = backends.choose(device_type)
    found = [f"backend: {chosen} on {device_type}", *choice.describe(device_type)]
    if chosen != "reference":
        found.append(f"plan: {plans.describe(device_type)}")
    return found + [f"fold: {line}" for line in folded_choice.describe() if device_type == "cpu"]


def _kept() -> dict[str, str]:
    """What processes before this one measured: convolutions of the CPU, and what ran and why on
    devices of ``backends.MEASURED``."""
    rows = {}
    plans_kept = tuning.stored("plan", torch.device("cpu"))
    for number, (problem, own) in enumerate(sorted(plans_kept.items()), 1):
        rows[f"kept for cpu {number}"] = (
            f"{problem}: {'our convolution' if own == (True,) else 'the library'}"
        )
    for device in backends.MEASURED:
        if device == "cuda" and not torch.cuda.is_available():
            continue
        kept = tuning.stored("backend", torch.device(device))
        for number, (problem, chosen) in enumerate(sorted(kept.items()), 1):
            rows[f"kept for {device} {number}"] = f"{problem}: {', '.join(map(str, chosen))}"
    return rows


def main() -> None:
    """Print the report as a table of two columns."""
    rows = report()
    width = max(map(len, rows))
    print("\n".join(f"{title:<{width}}  {value}" for title, value in rows.items()))


if __name__ == "__main__":
    main()
