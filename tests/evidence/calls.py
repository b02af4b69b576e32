"""Calls of the launchers at shapes of real networks, on tensors without memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from preact import device as devices
from preact.triton_kernels.batch_norm_backward_coefficients import batch_norm_backward_coefficients
from preact.triton_kernels.batch_norm_relu import batch_norm_relu
from preact.triton_kernels.batch_norm_relu_backward_apply import batch_norm_relu_backward_apply
from preact.triton_kernels.batch_norm_relu_backward_reduce import batch_norm_relu_backward_reduce
from preact.triton_kernels.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from preact.triton_kernels.batch_norm_relu_conv2d_backward_input import (
    batch_norm_relu_conv2d_backward_input,
)
from preact.triton_kernels.batch_norm_relu_conv2d_backward_weight import (
    batch_norm_relu_conv2d_backward_weight,
)
from preact.triton_kernels.batch_norm_stats import batch_norm_stats
from preact.triton_kernels.identity_add import identity_add

from .launches import meta

Calls = dict[str, Callable[[], Any]]

# The second is 14 pixels wide: 196 is divisible by 4 alone, and 8 bytes a thread is all it allows.
SHAPE, NARROW = (32, 64, 56, 56), (32, 96, 14, 14)


OUT_SIZE = 28


class Convolution(NamedTuple):
    kernel: int
    channels: int
    out_channels: int
    stride: int = 1

    def __str__(self) -> str:
        strided = "" if self.stride == 1 else f" /{self.stride}"
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.out_channels}{strided}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (32, self.channels, *(self.stride * OUT_SIZE,) * 2)


def parsed(text: str) -> Convolution:
    """The convolution that ``str`` made ``text`` of."""
    found = re.fullmatch(r"(\d+)x\d+ (\d+)->(\d+)(?: /(\d+))?", text)
    assert found, text
    kernel, channels, outs, stride = (int(part or 1) for part in found.groups())
    return Convolution(kernel, channels, outs, stride)


# Tiles of each size that the channels of CIFAR's and ImageNet's networks lead to.
WIDE = (Convolution(3, 64, 128), Convolution(1, 64, 128))
NARROWER = (Convolution(3, 16, 16), Convolution(3, 32, 32), Convolution(1, 64, 16))
STRIDED = Convolution(3, 64, 128, 2)
DENSE = Convolution(3, 128, 32)
# Sums so long that a product waits for no map.
LONGER = (
    Convolution(3, 256, 256), Convolution(3, 256, 256, 2), Convolution(1, 992, 128),
    Convolution(1, 1024, 256), Convolution(1, 256, 1024), Convolution(1, 2048, 512),
)  # fmt: skip
ALL_CONVOLUTIONS = (
    *WIDE, *NARROWER, Convolution(3, 64, 64), Convolution(1, 256, 64), Convolution(3, 128, 128),
    STRIDED, DENSE, Convolution(3, 32, 64, 2), Convolution(1, 16, 64), *LONGER,
)  # fmt: skip


def streaming(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Calls:
    x = meta(*shape, dtype=dtype, channels_last=channels_last)
    vector = torch.empty(shape[1], device="meta")
    norm = (vector,) * 4
    return {
        "batch_norm_stats": lambda: batch_norm_stats(x),
        "identity_add": lambda: identity_add(x, x),
        "batch_norm_relu": lambda: batch_norm_relu(x, *norm, 1e-5),
        "batch_norm_relu_backward_reduce": lambda: batch_norm_relu_backward_reduce(
            x, x, *norm, 1e-5
        ),
        "batch_norm_relu_backward_apply": lambda: batch_norm_relu_backward_apply(
            x, x, *norm, vector, vector, x, 1e-5
        ),
    }


def convolution(case: Convolution, dtype: torch.dtype) -> Calls:
    """Forward with a residual, backward with a pending gradient that the first kernel forms."""
    kernel, channels, outs, stride = case
    x = meta(*case.input_shape, dtype=dtype)
    out = meta(32, outs, OUT_SIZE, OUT_SIZE, dtype=dtype)
    conv_weight = meta(outs, channels, kernel, kernel, dtype=dtype)
    vector = torch.empty(channels, device="meta")
    prefix = (x, *(vector,) * 4, 1e-5, conv_weight)
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    pending = (out, torch.empty(4, outs, device="meta"))
    return {
        "forward": lambda: batch_norm_relu_conv2d(*prefix, None, out, *geometry),
        "input": lambda: batch_norm_relu_conv2d_backward_input(
            out, *prefix, *geometry, *pending, None, out
        ),
        "weight": lambda: batch_norm_relu_conv2d_backward_weight(out, *prefix, *geometry),
        "coefficients": lambda: batch_norm_backward_coefficients(
            x, vector, vector, vector, vector, vector, 1e-5
        ),
    }


@contextmanager
def launched_for(arch: int, precision: str = "tf32") -> Iterator[None]:
    """Launchers decide as for ``sm_<arch>`` here, with that precision of float32 products."""
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        with mock.patch.object(devices, "WRITTEN_DEFAULT", devices.Properties("none", arch, 132)):
            yield
    finally:
        conv.fp32_precision = before
