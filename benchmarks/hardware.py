"""What the figures were measured on: versions, processor, threads, allocator, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

__all__ = ["describe"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _preact_version() -> str:
    version = _version("preact")
    if version:
        return version
    import preact  # a source tree that is not installed

    return str(getattr(preact, "__version__", "source"))


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def _backends(device_type: str) -> str:
    from preact import backends

    return " ".join(
        sorted(name for name, reason in backends.available(device_type).items() if not reason)
    )


def _load() -> str:
    """Load average of the last minute: more than next to nothing spoils every figure."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def describe(device: torch.device, allocator: str) -> dict[str, str]:
    """The columns that are the same for every row of a run; none of them holds a path."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        hardware = _processor()
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "hardware": hardware,
        "capability": capability,
        "cores": str(os.cpu_count() or ""),
        "threads": str(torch.get_num_threads()),
        "allocator": allocator,
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "preact": _preact_version(),
        "backends": _backends(device.type),
    }
