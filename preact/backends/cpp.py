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

from ..reference import memory_format_of

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""

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
        return load() or load("_C_cuda") or _too_old_gpu()
    return f"no native kernels for device type {device_type}"


@functools.cache
def _decide_winograd() -> bool:
    choice = os.environ.get("PREACT_CONV", "auto")
    if choice == "library":
        raise ValueError("PREACT_CONV=library is PREACT_PLAN=B: every convolution the library's")
    if choice not in ("auto", "direct"):
        raise ValueError(f"PREACT_CONV must be auto or direct, got {choice!r}")
    return choice == "auto"


@constant_to_compile
def _has_winograd() -> bool:
    """``PREACT_CONV=direct`` does without, here and in the kernels."""
    return _decide_winograd()


@functools.cache
def _decide_vectors() -> bool:
    return cpu_capability() in ("AMX", "AVX512_BF16", "AVX512", "AVX2")


@constant_to_compile
def _has_vectors() -> bool:
    """Whether this processor has the instructions that make our convolutions worth running."""
    return _decide_vectors()


@functools.cache
def _decide_bfloat16() -> bool:
    return cpu_capability() in ("AMX", "AVX512_BF16")


@constant_to_compile
def _multiplies_bfloat16() -> bool:
    """Whether these kernels have instructions for it; else elements are widened on the way."""
    return _decide_bfloat16()


# What oneDNN may be lowered to that has none; it takes either case, and the first variable that is
# not empty.
_ISA_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


@functools.cache
def _decide_library_bfloat16() -> bool:
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    return isa.upper() not in _ISA_WITHOUT_BFLOAT16 and bool(
        ctypes.CDLL(str(native_path())).preact_processor_multiplies_bfloat16()
    )


@constant_to_compile
def _library_multiplies_bfloat16() -> bool:
    return _decide_library_bfloat16()


# Weights up to which our convolution won against the library's between our passes, by whole
# networks and single layers of ResNets and DenseNets, with AVX-512 and AVX2. Larger ones leave the
# cache; without the statistics, which it takes almost for free, a forward gains least.
_MOST_WEIGHTS = {
    "forward": 20_000,
    "forward with statistics": 70_000,
    "backward": 140_000,
    "dense block": 300_000,
}
_MOST_WEIGHTS_WINOGRAD = {
    "forward": 600_000,
    "forward with statistics": 600_000,
    "backward": 300_000,
    "dense block": 300_000,
}
# In bfloat16, on tile registers, it won all along, up to these sizes; in training pointwise
# convolutions and those of stride 2 took 0.63 to 0.93 of the library's time up to the larger one.
# With AVX512_BF16 there is a tie near the limit (0.91 to 1.02 in training).
_MOST_WEIGHTS_TILES = {
    "forward": 140_000,
    "forward with statistics": 140_000,
    "backward": 140_000,
    "dense block": 300_000,
}
_MOST_WEIGHTS_TILES_FEW_TAPS = 350_000
# For 196 pixels those of 262,000 and 590,000 weights ran at 0.60 to 0.98 of the library's speed in
# both types, pointwise ones on one of two threads; for 588 at 0.77 to 1.21. The limits are between.
_PIXELS, _MOST_WEIGHTS_FEW_PIXELS = 256, 100_000
# Where the processor does not multiply bfloat16, the library takes 2 (AVX-512) to 10 times (AVX2)
# as long as in float32, and ours little longer: 0.06 to 0.82 of its time in all that was measured.
_MOST_WEIGHTS_WIDENED = 2_400_000


@constant_to_compile
def _threads() -> int:
    return torch.get_num_threads()


# Shares of the threads that are to have an image, on average until the last is done: three images
# on two threads ran at 1.2 to 1.4 of the library's speed in float32, at 0.75 to 0.81 in bfloat16
# or with stride 2, where it is measured if there is enough to do. A dense block saves so much
# between its convolutions that on two threads it wins with one image. More threads were never
# timed.
_OCCUPIED, _OCCUPIED_DENSE = 0.75, 0.5
# Rows of a band, at least (DirectBlocks::of_result).
_BAND_ROWS = 8
# Multiplications that idle threads may leave to the others: by estimate 20 us, less than one op
# instead of three saves.
_IDLE = 1_500_000


def occupies_threads(input: Tensor, weight: Tensor, geometry: Geometry, work: str) -> bool:
    """Whether images keep the threads busy, or there is too little to do to miss one. Pointwise
    convolutions divide pixels among threads, others images, in forward those of a batch smaller
    than the threads into bands of rows."""
    stride, padding, _, _ = geometry
    if weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0):
        return True
    blocks, threads = input.size(0), _threads()
    if work.startswith("forward"):
        blocks *= bands(input, weight, geometry, threads)
    rounds = -(-blocks // threads)
    if blocks >= (_OCCUPIED_DENSE if work == "dense block" else _OCCUPIED) * rounds * threads:
        return True
    whole = multiplications(input, weight, stride)
    return rounds * whole // blocks - whole // threads <= _IDLE


def bands(input: Tensor, weight: Tensor, geometry: Geometry, threads: int) -> int:
    """Into how many the kernels divide an image in forward for the sake of ``threads``."""
    stride, padding, dilation, _ = geometry
    if input.size(0) >= threads or 2 * padding[0] > (weight.size(2) - 1) * dilation[0]:
        return 1
    height, wanted = -(-input.size(2) // stride[0]), -(-threads // input.size(0))
    return -(-height // max(-(-height // wanted), _BAND_ROWS))


def multiplications(input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> int:
    """Of a convolution that keeps the image but for its stride."""
    return input.size(0) * input.size(2) * input.size(3) * weight.numel() // (stride[0] * stride[1])


def serves_direct(
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    work: str,
    dtype: torch.dtype,
) -> bool:
    """Whether the CPU's own convolution with the BN-ReLU prologue runs here, and on all threads.

    ``work`` is one of those of ``plans.fuses_convolution`` or "dense block"; ``dtype`` is the
    type that ``weight`` convolves in.
    """
    stride, _, _, groups = geometry
    return (
        input.dtype == dtype
        and input.dtype in (torch.float32, torch.bfloat16)
        and groups == 1
        and stride in ((1, 1), (2, 2))
        and memory_format_of(input) == torch.channels_last
        and _has_vectors()
        and occupies_threads(input, weight, geometry, work)
    )


def most_weights(input: Tensor, weight: Tensor, geometry: Geometry, work: str) -> int:
    """The written limit: weights up to which our convolution is the faster one.

    They are arranged anew at each call, which takes long where there are few pixels. A pointwise
    convolution that widens the map and does nothing more than that is faster in the library (0.69
    to 1.01 of its time in ours): it reads little that a prologue could save.
    """
    if input.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        # Built without them, or lowered: nothing is known to win against a library that has them.
        return 0 if _library_multiplies_bfloat16() else _MOST_WEIGHTS_WIDENED
    stride, _, dilation, _ = geometry
    if work == "forward" and weight.shape[2:] == (1, 1) and weight.size(0) > weight.size(1):
        return 0
    if work == "forward with residual":  # which it takes as cheaply as statistics
        work = "forward with statistics"
    if work != "dense block" and multiplications(input, weight, stride) < _PIXELS * weight.numel():
        return _MOST_WEIGHTS_FEW_PIXELS
    if input.dtype == torch.bfloat16:
        few_taps = weight.shape[2:] == (1, 1) or stride == (2, 2)
        if few_taps and work in ("forward with statistics", "backward"):
            return _MOST_WEIGHTS_TILES_FEW_TAPS
        return _MOST_WEIGHTS_TILES[work]
    if weight.shape[2:] == (3, 3) and stride == dilation == (1, 1) and _has_winograd():
        return _MOST_WEIGHTS_WINOGRAD[work]
    return _MOST_WEIGHTS[work]


# Channels for which one block of the CUDA kernels has shared memory on every GPU served.
_MOST_POINTWISE_CHANNELS = 2048
_POINTWISE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves_pointwise(
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
) -> bool:
    """Whether the CUDA matrix product runs a 1x1 convolution with its BN-ReLU.

    That it can is the whole rule so far: no GPU has timed it against the library's convolution.
    """
    _, padding, _, groups = geometry
    return (
        input.dtype == dtype
        and input.dtype in _POINTWISE_DTYPES
        and groups == 1
        and tuple(weight.shape[2:]) == (1, 1)
        and padding == (0, 0)
        and max(weight.size(0), weight.size(1)) <= _MOST_POINTWISE_CHANNELS
        and memory_format_of(input) == torch.channels_last
    )


def cpu_capability() -> str:
    """The instruction set the loaded CPU kernels use, or "" where nothing is built."""
    path = native_path()
    if path is None or load():
        return ""
    function = ctypes.CDLL(str(path)).preact_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())


def cpu_caches() -> tuple[int, int] | None:
    """Bytes of one core's data caches, first and second level, that the loaded CPU kernels make
    their blocks for; None where nothing is built."""
    path = native_path()
    if path is None or load():
        return None
    found = (ctypes.c_int64 * 2)()
    ctypes.CDLL(str(path)).preact_cpu_caches(found)
    return found[0], found[1]
