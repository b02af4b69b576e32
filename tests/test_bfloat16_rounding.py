"""The streaming ops round to bfloat16 as PyTorch does, bit for bit, wherever an element lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from preact.backends import available

from .op_checks import arrange

OPS = torch.ops.preact
# Whole vectors of every instruction set; rests of rows and planes, and rows shorter than a vector.
SHAPES = [(4, 64, 16, 16), (37, 37, 7, 7), (911, 8, 3, 3)]
LAYOUTS = ["contiguous", "channels_last"]
NANS = [0x7FFFFFFF, 0x7F800001, -1]  # payloads that a carry out of the lower half would destroy

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)


def patterns(shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Every bit pattern of bfloat16 in turn: denormal, infinite and not a number among them."""
    count = torch.Size(shape).numel()
    bits = (torch.arange(count) * 40503 + start) % 65536 - 32768  # an odd step meets all of them
    return bits.to(torch.int16).view(torch.bfloat16).reshape(shape)


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(result.isnan(), expected.isnan())
    bits = [t.contiguous().view(torch.int16)[~expected.isnan()] for t in (result, expected)]
    assert torch.equal(*bits), f"{int((bits[0] != bits[1]).sum())} elements differ"


def vectors(channels: int, weight: Tensor, bias: float = 0.0) -> tuple[Tensor, ...]:
    """mean, var, weight, bias of a batch norm that with eps = 1 multiplies by weight alone."""
    zeros = torch.zeros(channels)
    return zeros, zeros, weight, torch.full((channels,), bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_round_to_nearest_even(shape, layout):
    every = patterns(shape)
    assert every.view(torch.int16).unique().numel() == 65536
    signs = torch.randint(0, 2, shape) * 2 - 1
    # Halves of the last place and their neighbours, at any scale down to denormal sums.
    steps = (every.float() * 2.0**-8 * torch.randint(1, 8, shape) / 4 * signs).bfloat16()
    for other in (torch.zeros(shape).bfloat16(), steps, patterns(shape, 12345), -every):
        total, _, _ = OPS.identity_add(arrange(every, layout), arrange(other, layout))
        assert_same_bits(total, every + other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 + 2.0**-8, 1 - 2.0**-9, 3e-5, 2.0**-126, 1e38], ids=str)
def test_products_round_to_nearest_even(shape, layout, scale):
    x = patterns(shape)
    channels = shape[1]
    weight = torch.full((channels,), scale)
    result = OPS.batch_norm_relu(arrange(x, layout), *vectors(channels, weight), 1.0)
    assert_same_bits(result + 0, torch.relu(x.float() * scale).bfloat16() + 0)  # -0 is 0
    # Of any sign: the gradient where the activation is positive.
    ones = arrange(torch.ones(shape).bfloat16(), layout)
    norm = vectors(channels, weight, 1.0)
    result = OPS.batch_norm_relu_backward_apply(
        arrange(x, layout), ones, *norm, None, None, None, 1.0
    )
    assert_same_bits(result, (x.float() * scale).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", NANS)
def test_any_nan_of_a_channel_stays_one(layout, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    shape = (2, 34, 5, 7)
    x = arrange(torch.randn(shape).abs().bfloat16() + 1, layout)
    sums = [torch.randn(34), torch.randn(34)]
    for i in range(6):
        arguments = [torch.zeros(34), torch.ones(34), torch.ones(34), torch.zeros(34), *sums]
        arguments[i] = arguments[i].clone()
        arguments[i][[3, 33]] = nan
        expected = torch.zeros(shape, dtype=torch.bool)
        expected[:, [3, 33]] = True
        if i < 4:
            assert torch.equal(OPS.batch_norm_relu(x, *arguments[:4], 1e-5).isnan(), expected)
        if i != 3:  # a bias decides what is active, and a NaN is
            result = OPS.batch_norm_relu_backward_apply(x, x, *arguments, None, 1e-5)
            assert torch.equal(result.isnan(), expected)
