"""What a choice needs to know of a device; asked at a launch or a choice, never at import."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch


class Properties(NamedTuple):
    name: str
    capability: int
    """90 for sm_90."""
    multiprocessors: int


# The interpreter has no device; a launcher then decides as for this one.
WRITTEN_DEFAULT = Properties("none", 90, 132)


@functools.cache
def _of_gpu(index: int) -> Properties:
    found = torch.cuda.get_device_properties(index)
    return Properties(
        found.name, found.major * 10 + found.minor, found.multi_processor_count
    )  # fmt: skip


def properties(device: torch.device) -> Properties:
    """Those of a GPU, or of ``WRITTEN_DEFAULT`` for any other device."""
    if device.type != "cuda":
        return WRITTEN_DEFAULT
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        name = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if name:
            return f"{name.group(1)} ({platform.machine()})"
    return platform.processor() or platform.machine()


# What changes the kernels of one side or the other, and with them the times.
_VARIABLES = (
    "PREACT_CPU_CAPABILITY", "PREACT_CPU_CACHES", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
)  # fmt: skip


@functools.cache
def _model() -> list[str]:
    """Family and model: a virtual machine may give processors of several generations one name."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    fields = (re.search(rf"^{name}\s*:\s*(\d+)$", text, re.M) for name in ("cpu family", "model"))
    return [field.group(1) for field in fields if field]


def description(device: torch.device) -> str:
    """Of the hardware: what is measured on one holds for another of the same description."""
    if device.type == "cuda":
        found = properties(device)
        return f"{found.name}-sm_{found.capability}"
    parts = [processor(), *_model(), f"{torch.get_num_threads()}_threads"]
    lowered = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return "-".join(parts + lowered)
