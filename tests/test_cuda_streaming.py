"""The streaming CUDA kernels, executed on the CPU by ``cuda_emulation``, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from preact import reference

from . import cuda_emulation
from .cuda_emulation import compile_program, prepare, read, run
from .cuda_emulation.streaming import DTYPES, EPS, OPS, Sample, sample, samples
from .tolerances import error

pytestmark = pytest.mark.skipif(
    cuda_emulation.why_not() != "", reason=cuda_emulation.why_not() or "emulation"
)


def results_of(folder: Path, one: Sample) -> tuple[Tensor, ...]:
    dtype = one.folder["input"].dtype
    vector = reference.accumulate_dtype(dtype)
    maps = ("output", "grad_input")
    return tuple(
        read(folder / f"{name}.out", dtype if name in maps else vector) for name in one.results
    )


def execute(op: str, cases: Sequence[Sample], directory: Path) -> list[tuple[Tensor, ...]]:
    program = compile_program(op)
    folders = [prepare(directory / f"{op}-{i}", one.folder) for i, one in enumerate(cases)]
    result = run(program, folders)
    last = result.stdout.splitlines()[-1:] or [""]
    assert result.returncode == 0, f"in {last[0]}:\n{result.stderr}"
    return [results_of(folder, one) for folder, one in zip(folders, cases, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_kernel_equals_its_formula(op, dtype, tmp_path):
    cases = list(samples(op, dtype))
    for one, results in zip(cases, execute(op, cases, tmp_path), strict=True):
        one.check(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_the_forwards_bit_for_bit(dtype, tmp_path):
    """Values whose z is a rounding error away from zero, where another formula would differ."""
    shape = (4, 6, 8, 8)
    backward = []
    for channels_last in (False, True):
        one = sample("batch_norm_relu_backward_apply", shape, dtype, channels_last, optional=False)
        _, _, mean, var, weight, bias = one.arguments[:6]
        edge = mean - bias / (weight / torch.sqrt(var + EPS))
        ulps = torch.randint(-3, 4, shape).double()
        x = edge.view(1, -1, 1, 1).double() * (1 + ulps * torch.finfo(dtype).eps / 2)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        one.folder["input"] = x.to(dtype).contiguous(memory_format=layout)
        one.folder["grad_output"] = torch.ones_like(one.folder["input"])
        one.folder["weight"] = weight
        backward.append(one)
    gradients = execute("batch_norm_relu_backward_apply", backward, tmp_path)
    forward = [
        Sample("batch_norm_relu", one.folder, (), ("output",), shape, one.channels_last)
        for one in backward
    ]
    outputs = execute("batch_norm_relu", forward, tmp_path)
    for (gradient,), (output,) in zip(gradients, outputs, strict=True):
        assert torch.equal(gradient != 0, output > 0)
        assert 0 < int((output > 0).sum()) < output.numel()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (5.0, 0.1), (-300.0, 0.01), (0.0, 1e-6)])
def test_large_mean_small_variance(mean, std, channels_last, tmp_path):
    x = (torch.randn(4, 4, 24, 24, dtype=torch.float64) * std + mean).float()
    one = sample("batch_norm_stats", tuple(x.shape), torch.float32, channels_last, x=x, seeds=1)
    [(result_mean, result_var)] = execute("batch_norm_stats", [one], tmp_path)
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    torch.testing.assert_close(result_mean.double(), expected_mean, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(result_var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["batch_norm_stats", "identity_add"])
def test_statistics_of_images_far_apart(op, tmp_path):
    """A shift that fits the first images says nothing of the later ones."""
    x = torch.randn(8, 3, 20, 20) + 1e3 * torch.randn(8, 1, 1, 1)
    cases = [
        sample(op, tuple(x.shape), torch.float32, last, x=x, seeds=1) for last in (False, True)
    ]
    for one, results in zip(cases, execute(op, cases, tmp_path), strict=True):
        expected_mean, expected_var = one.expected(lambda tensor: tensor.double())[-2:]
        mean, var = results[-2:]
        assert ((mean - expected_mean).abs() <= 1e-6 * expected_var.sqrt()).all()
        torch.testing.assert_close(var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channel_has_no_variance(dtype, tmp_path):
    x = torch.full((4, 5, 6, 7), 3.1).to(dtype)
    cases = [
        sample("batch_norm_stats", (4, 5, 6, 7), dtype, last, x=x, seeds=1)
        for last in (False, True)
    ]
    for mean, var in execute("batch_norm_stats", cases, tmp_path):
        assert torch.equal(mean, x[0, :, 0, 0].to(mean.dtype))
        assert torch.equal(var, torch.zeros_like(var))


def test_nan_and_infinity_pass_as_in_eager(tmp_path):
    cases = []
    for last in (False, True):
        x = torch.randn(2, 16, 4, 4)
        x[0, 3, 1, 2], x[1, 5, 0, 0] = float("nan"), float("inf")
        one = sample("batch_norm_relu", (2, 16, 4, 4), torch.float32, last, x=x, seeds=1)
        vectors = (torch.zeros(16), torch.ones(16), torch.ones(16), torch.zeros(16))
        one.folder |= dict(zip(("mean", "var", "weight", "bias"), vectors, strict=True))
        one.arguments = (x, *vectors, EPS)
        cases.append(one)
    for one, (output,) in zip(cases, execute("batch_norm_relu", cases, tmp_path), strict=True):
        [expected] = one.expected()
        assert torch.equal(one.arrange(output).isnan(), expected.isnan())
        assert torch.equal(one.arrange(output).isinf(), expected.isinf())


def test_constant_statistics_keep_infinite_input_out_of_the_gradient(tmp_path):
    """In evaluation dx = dz * scale: nothing multiplies x, so infinity must not become NaN."""
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 3] = float("inf")
    op = "batch_norm_relu_backward_apply"
    one = sample(op, (2, 3, 4, 4), torch.float32, False, x=x, optional=False, seeds=1)
    constants = (torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3))
    one.folder |= dict(zip(("mean", "var", "weight", "bias"), constants, strict=True))
    [(result,)] = execute(op, [one], tmp_path)
    assert result.isfinite().all()
    grad = one.folder["grad_output"]
    expected = reference.batch_norm_relu_backward_apply(grad, x, *constants, None, None, None, EPS)
    assert error(one.arrange(result), expected) <= 1e-6


@pytest.mark.parametrize("op", OPS)
def test_no_images(op, tmp_path):
    one = sample(op, (0, 3, 4, 4), torch.float32, False, seeds=1)
    [results] = execute(op, [one], tmp_path)
    for result, expected in zip(results, one.expected(), strict=True):
        assert torch.equal(result.isnan(), expected.flatten().isnan())
