"""The native extension: found, loaded on first need, and the reason where it cannot be."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from . import cuda_conv2d

Decided = TypeVar("Decided", bound=Callable[..., object])


def constant_to_compile(function: Decided) -> Decided:
    """Mark a function whose result torch.compile takes as it is, without tracing into it.

    The mark of ``torch.compiler.assume_constant_result``, which would import Dynamo and Triton.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


OLDEST_CAPABILITY = (8, 0)
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


@functools.cache
def _too_old_gpu() -> str:
    """The CUDA kernels use instructions that older GPUs lack; empty where there is no GPU."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            oldest = "".join(map(str, OLDEST_CAPABILITY))
            found = "".join(map(str, capability))
            return f"GPU {index} is of sm_{found}, the CUDA kernels need sm_{oldest} or later"
    return ""


def why_not(device_type: str) -> str:
    """Empty where the native kernels serve the device, else the reason why not."""
    if device_type == "cpu":
        return load()
    if device_type == "cuda":
        reason = load() or load("_C_cuda")
        if not reason:
            cuda_conv2d.register()
        return reason
    return f"no native kernels for device type {device_type}"


@constant_to_compile
@functools.cache
def _own_weight_gradients() -> bool:
    choice = os.environ.get("PREACT_CONV", "auto")
    if choice not in ("auto", "library"):
        raise ValueError(f"PREACT_CONV must be auto or library, got {choice!r}")
    return choice == "auto" and cpu_capability() == "AVX2"


def prefers_weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, groups: int
) -> bool:
    """Whether ``conv2d_weight_gradient`` is to be used in place of PyTorch's own.

    Measured with AVX2: PyTorch's takes 1.2 to 2.3 times as long for 3x3 kernels on images of 7x7
    to 56x56, and less for 1x1 kernels and for large weights; with AVX-512 it is near the
    processor's peak and stays. ``PREACT_CONV=library`` switches the choice off.
    """
    _, channels, kernel_h, kernel_w = weight.shape
    return (
        input.device.type == "cpu"
        and input.dtype == grad_output.dtype == torch.float32
        and groups == 1
        and kernel_h * kernel_w > 1
        and channels % 16 == 0
        and weight.numel() <= 300_000
        and grad_output.size(2) * grad_output.size(3) >= 49
        and _own_weight_gradients()
    )


def cpu_capability() -> str:
    """The instruction set the loaded CPU kernels use, or "" where nothing is built."""
    path = native_path()
    if path is None or load():
        return ""
    function = ctypes.CDLL(str(path)).preact_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())
