"""The convolution kernels in bfloat16, compiled as one architecture of each kind takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from preact.triton_kernels import device as devices
from preact.triton_kernels.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from preact.triton_kernels.batch_norm_relu_conv2d_backward_input import (
    batch_norm_relu_conv2d_backward_input,
)
from preact.triton_kernels.batch_norm_relu_conv2d_backward_weight import (
    batch_norm_relu_conv2d_backward_weight,
)

from .evidence import interpreter
from .evidence.binaries import assert_sound, compile_launch
from .evidence.launches import meta, record

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)


def calls(kernel: int) -> dict[str, Callable[[], Any]]:
    """Forward with a residual, and both backward kernels with their gradient pending."""
    x, out = (meta(32, n, 28, 28, dtype=torch.bfloat16) for n in (64, 128))
    conv_weight = meta(128, 64, kernel, kernel, dtype=torch.bfloat16)
    prefix = (x, *(torch.empty(64, device="meta"),) * 4, 1e-5, conv_weight)
    geometry = ((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    pending = (out, torch.empty(4, 128, device="meta"))
    return {
        "forward": lambda: batch_norm_relu_conv2d(*prefix, None, out, *geometry),
        "input": lambda: batch_norm_relu_conv2d_backward_input(out, *prefix, *geometry, *pending),
        "weight": lambda: batch_norm_relu_conv2d_backward_weight(out, *prefix, *geometry, *pending),
    }


@pytest.mark.parametrize("op", ["forward", "input", "weight"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_written_default(
    arch: int, kernel: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "WRITTEN_DEFAULT", devices.Properties("none", arch, 132))
    launch = record(calls(kernel)[op])[0]
    binary = compile_launch(launch, arch)
    assert_sound(binary, launch)
    assert binary.main_loop.tensor_core, "the main loop multiplies without tensor cores"
