"""One table of ops against the formulas of ``reference`` in float64, whatever the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from preact import reference

from .tolerances import error, floor

Sample = tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return tensor.repeat_interleave(2, dim=3)[..., ::2]
    return tensor


def sample(
    ops: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    affine: bool,
    device: torch.device | str = "cpu",
) -> Sample:
    """Input, gradient, skip gradient, and (mean, var, weight, bias)."""
    x, grad, skip = (arrange(torch.randn(shape).to(device, dtype), layout) for _ in range(3))
    x = arrange(x * 2 + 1, layout)
    mean, var = ops.batch_norm_stats(x)
    vector = reference.accumulate_dtype(dtype)
    weight = torch.randn(shape[1], dtype=vector).to(device) if affine else None
    bias = torch.randn(shape[1], dtype=vector).to(device) if affine else None
    return x, grad, skip, (mean, var, weight, bias)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def check(name: str, result: Tensor, expected: Tensor) -> None:
    """A few roundings of the sums (float32 or float64) and one of the result's own type."""
    accumulation = torch.finfo(reference.accumulate_dtype(result.dtype)).eps
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    bound = floor(result, expected) + 32 * accumulation * (scale + 1)
    assert error(result, expected) <= bound, f"{name}: {error(result, expected):.3g} > {bound:.3g}"


def check_every_op(ops: Any, given: Sample) -> None:
    """Every streaming op on one ``sample``."""
    x, grad, skip, vectors = given
    exact = tuple(double(v) for v in vectors)
    mean, var = vectors[:2]
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    check("mean", mean, expected_mean)
    check("var", var, expected_var)

    output = ops.batch_norm_relu(x, *vectors, 1e-5)
    check("output", output, reference.batch_norm_relu(x.double(), *exact, 1e-5))
    assert output.is_contiguous(memory_format=reference.memory_format_of(x))
    assert output.dtype == x.dtype

    total, total_mean, total_var = ops.identity_add(x, skip)
    assert torch.equal(total, x + skip)
    expected_mean, expected_var = reference.batch_norm_stats(total.double())
    check("mean of sum", total_mean, expected_mean)
    check("var of sum", total_var, expected_var)

    sums = ops.batch_norm_relu_backward_reduce(grad, x, *vectors, 1e-5)
    expected_sums = reference.batch_norm_relu_backward_reduce(
        grad.double(), x.double(), *exact, 1e-5
    )
    terms = reference.batch_norm_relu_backward_reduce(
        grad.double().abs(), x.double(), *exact, 1e-5
    )[1]
    for name, result, value in zip(("grad_weight", "grad_bias"), sums, expected_sums, strict=True):
        # The terms of a sum may cancel: its error is judged by their magnitude.
        spread = float(terms.max()) * torch.finfo(result.dtype).eps * 32
        assert error(result, value) <= spread + floor(result, value), name
    # Bit for bit the forward's mask: with constant statistics and a weight, dx is zero where dz is.
    ones = torch.ones_like(x)
    passed = ops.batch_norm_relu_backward_apply(ones, x, *vectors, None, None, None, 1e-5)
    assert torch.equal(passed != 0, output > 0), "the backward's mask differs from the forward's"

    for totals in (sums, (None, None)):
        for extra in (None, skip):
            result = ops.batch_norm_relu_backward_apply(grad, x, *vectors, *totals, extra, 1e-5)
            expected = reference.batch_norm_relu_backward_apply(
                grad.double(), x.double(), *exact, *map(double, totals), double(extra), 1e-5
            )
            check("grad_input", result, expected)
