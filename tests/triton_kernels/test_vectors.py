"""Per-channel vectors as users hold them: views with gaps, one number for all, in a half type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preact import reference

from ..tolerances import assert_as_good_as_eager

OPS = torch.ops.preact_triton
CHANNELS, OUTS = 20, 17


def gaps(vector: Tensor) -> Tensor:
    held = torch.full((2 * vector.numel(),), float("nan"), dtype=vector.dtype, device=vector.device)
    held[::2] = vector
    return held[::2]


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": gaps,
    "one for all": lambda vector: vector[:1].expand(vector.numel()),
    "half": lambda vector: vector.to(torch.bfloat16),
}


@pytest.mark.parametrize("style", STYLES)
def test_vectors(style, device):
    make = STYLES[style]
    dtype = torch.bfloat16 if style == "half" else torch.float32
    x = torch.randn(2, CHANNELS, 6, 5, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, OUTS, 6, 5, device=device).to(dtype)
    vectors = [
        make(torch.rand(CHANNELS, device=device) + low) for low in (-0.5, 0.5, 0.5, 0.2)
    ]  # mean, var, weight, bias
    sums = [make(torch.randn(CHANNELS, device=device)) for _ in range(2)]
    conv = torch.randn(OUTS, CHANNELS, 3, 3, device=device).to(dtype)
    conv_bias = make(torch.randn(OUTS, device=device)).to(dtype)
    coefficients = torch.randn(OUTS, 4, device=device).t()
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    norm = (x, *vectors, 1e-5)
    calls = {
        "batch_norm_relu": norm,
        "batch_norm_relu_backward_reduce": (x, *norm),
        "batch_norm_relu_backward_apply": (x, x, *vectors, *sums, None, 1e-5),
        "batch_norm_backward_coefficients": (x, *vectors[:3], *sums, 1e-5),
        "batch_norm_relu_conv2d": (*norm, conv, conv_bias, None, *geometry),
        "batch_norm_relu_conv2d_backward": (
            grad, *norm, conv, None, *geometry, grad, coefficients
        ),
    }  # fmt: skip
    for name, arguments in calls.items():
        double = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        results = [
            [r] if isinstance(r, Tensor) else r
            for r in (
                getattr(OPS, name)(*arguments),
                getattr(reference, name)(*arguments),
                getattr(reference, name)(*double),
            )
        ]
        for index, (found, eager, exact) in enumerate(zip(*results, strict=True)):
            assert found.dtype == eager.dtype, f"{name}, result {index}"
            terms = float(exact.abs().max()) if exact.dim() == 1 else 0.0
            assert_as_good_as_eager(f"{name}, result {index}", found, eager, exact, terms)
