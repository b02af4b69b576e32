"""The Triton kernels: where they run, why not elsewhere, and their ops ``torch.ops.preact_triton``.

The ops have the schemas and fakes of ``torch.ops.preact`` and another namespace, because both may
hold kernels for the same device. Triton is imported at the first call that it serves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference

NAMESPACE = "preact_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""Compute capability from which the kernels are checked."""

_KERNELS = "preact.triton_kernels"


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device_type: str) -> str:
    """Empty where the Triton kernels serve the device, else the reason why not."""
    if not _is_installed():
        return "Triton is not installed"
    if device_type not in ("cpu", "cuda"):
        return f"no Triton kernels for device type {device_type}"
    if _interprets():
        return ""
    if device_type == "cpu":
        return "on a CPU Triton runs in its interpreter only, which TRITON_INTERPRET=1 switches on"
    if torch.version.hip is not None:
        return "the Triton kernels are checked for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "no usable GPU was found"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {capability}, {OLDEST} is the oldest one served"
    return ""


@functools.cache
def _launcher(name: str) -> Callable[..., Any] | None:
    """The op's launcher; None for an op that has no Triton kernel."""
    module = f"{_KERNELS}.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return launcher


def _prepared(argument: Any) -> Any:
    """A per-channel vector as the kernels read it: without gaps, and not in a half type, in which
    statistics and partial sums would then be kept. Anything else as it is."""
    if not isinstance(argument, Tensor) or argument.dim() != 1:
        return argument
    half = argument.dtype in (torch.bfloat16, torch.float16)
    return (argument.float() if half else argument).contiguous()


def _implementation(name: str) -> Callable[..., Any]:
    """The launcher, or the reference for what it does not take: float64 and empty maps."""

    def run(map: Tensor, *args: Any) -> Any:
        launcher = _launcher(name)
        if launcher is None or map.dtype not in DTYPES or map.numel() == 0:
            return getattr(reference, name)(map, *args)
        with torch.cuda.device_of(map):
            return launcher(map, *(_prepared(argument) for argument in args))

    return run


_library = ops.define(NAMESPACE, _implementation)
