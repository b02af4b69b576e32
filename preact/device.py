"""What a choice needs to know of a device; asked at a launch or a choice, never at import."""

from __future__ import annotations

import functools
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


def description(device: torch.device) -> str:
    """Of the hardware: what is measured on one holds for another of the same description."""
    if device.type == "cuda":
        found = properties(device)
        return f"{found.name}-sm_{found.capability}"
    return f"{processor()}-{torch.get_num_threads()}_threads"
