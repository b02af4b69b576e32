"""The native extension: found, loaded on first need, and the reason where it cannot be."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def native_path(name: str = "_C") -> Path | None:
    """Path of a built library of this package (``_C`` or ``_C_cuda``), or None."""
    candidate = _PACKAGE / f"{name}.abi3.so"
    return candidate if candidate.exists() else None


@functools.cache
def load(name: str = "_C") -> str:
    """Load a library, which registers its kernels. Empty on success, else the reason."""
    path = native_path(name)
    if path is None:
        return f"the native library {name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the native library {name} does not load: {error}"
    return ""


def why_not(device_type: str) -> str:
    """Empty where the native kernels serve the device, else the reason why not."""
    if device_type == "cpu":
        return load()
    if device_type == "cuda":
        return load() or load("_C_cuda")
    return f"no native kernels for device type {device_type}"


def cpu_capability() -> str:
    """The instruction set the loaded CPU kernels use, or "" where nothing is built."""
    path = native_path()
    if path is None or load():
        return ""
    function = ctypes.CDLL(str(path)).preact_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())
