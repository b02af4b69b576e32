"""The CPU's own convolution with its prefix, against the formulas in float64, in every geometry."""

from __future__ import annotations

import pytest
import torch

from preact import reference
from preact.backends import available, cpp

from .op_checks import check
from .tolerances import (
    EAGER_FACTOR,
    assert_as_good_as_eager,
    distance,
    error,
    floor,
    magnitude,
)

OPS = torch.ops.preact
CHANNELS_LAST = torch.channels_last

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

# Input, output channels, kernel, stride, padding, dilation.
CASES = [
    ((3, 16, 8, 8), 16, (3, 3), 1, (1, 1), 1),
    ((2, 48, 16, 14), 32, (3, 3), 1, (1, 1), 1),
    ((2, 5, 7, 9), 3, (3, 3), 1, (1, 1), 1),
    ((2, 40, 21, 34), 24, (3, 3), 1, (0, 2), 1),
    ((2, 16, 40, 41), 33, (3, 3), 1, (2, 0), 1),
    ((2, 17, 7, 9), 33, (3, 3), 2, (1, 1), 1),
    ((3, 16, 9, 9), 40, (1, 1), 1, (0, 0), 1),
    ((5, 24, 17, 13), 8, (1, 1), 1, (0, 0), 1),
    ((2, 24, 9, 8), 16, (1, 1), 2, (0, 0), 1),
    ((2, 16, 12, 11), 48, (3, 3), 2, (2, 2), 2),
    ((2, 16, 6, 7), 16, (1, 3), 1, (0, 1), 1),
    ((2, 16, 5, 5), 24, (2, 2), 1, (0, 0), 1),
    ((2, 16, 9, 9), 16, (5, 5), 2, (3, 3), 1),
    ((2, 70, 11, 3), 50, (3, 2), 1, (4, 0), 1),
    ((2, 16, 4, 4), 16, (1, 1), 1, (1, 1), 1),
    ((1, 32, 1, 2), 16, (3, 3), 2, (1, 1), 1),
    # One column of 16 channels, and a row of pixels left over, with another image to fetch.
    ((4, 16, 33, 1), 16, (3, 3), 1, (1, 1), 1),
    ((2, 16, 18, 2), 16, (3, 3), 2, (1, 1), 1),
    ((4, 64, 33, 1), 16, (3, 3), 1, (1, 1), 1),
]


VECTORS = ("mean", "var", "weight", "bias", "coefficients")


@pytest.fixture
def keeps_threads():
    """The number of threads is the test's to set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(table, given, dtype):
    """Every result of both ops, with everything optional given, and with nothing of it."""
    vector = reference.accumulate_dtype(dtype)
    t = {
        k: v.to(vector if k in VECTORS else dtype) if isinstance(v, torch.Tensor) else v
        for k, v in given.items()
    }
    prefix = (t["x"], t["mean"], t["var"], t["weight"], t["bias"], 1e-5, t["conv_weight"])
    geometry = t["geometry"]
    plain = table.batch_norm_relu_conv2d(*prefix, None, None, *geometry)
    full = table.batch_norm_relu_conv2d(*prefix, t["conv_bias"], t["residual"], *geometry)
    backward = table.batch_norm_relu_conv2d_backward(t["grad"], *prefix, None, *geometry)
    pending = table.batch_norm_relu_conv2d_backward(
        t["grad"], *prefix, t["grad_activation"], *geometry, t["pending"], t["coefficients"]
    )
    return {
        **{f"forward {i}": r for i, r in enumerate((*plain, *full))},
        **{f"backward {i}": r for i, r in enumerate((*backward, *pending))},
    }


def strides(tensor):
    """Those that say where an element is."""
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def rounded(tensor, dtype):
    return tensor.to(dtype).float()


def check_statistics_and_sums(found, given):
    """They are of results as rounded: to be judged by one's own, not by eager's."""
    for first in (0, 3):
        expected = reference.batch_norm_stats(found[f"forward {first}"].double())
        for index, value in enumerate(expected):
            check("statistics", found[f"forward {first + 1 + index}"], value)
    norm = (given["x"].double(), *(given[k].double() for k in VECTORS[:4]), 1e-5)
    for first in (0, 4):
        grad_z = found[f"backward {first}"].double()
        expected = reference.batch_norm_relu_backward_reduce(grad_z, *norm)
        terms = magnitude(reference.batch_norm_relu_backward_reduce(grad_z.abs(), *norm)[1])
        for index, value in enumerate(expected):
            result = found[f"backward {first + 1 + index}"]
            spread = 32 * torch.finfo(result.dtype).eps * terms
            assert error(result, value) <= spread + floor(result, value), (first, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_near_to_float64_as_the_library(case, weight_format, dtype):
    size, out_channels, kernel, stride, padding, dilation = case
    x = (torch.randn(size) * 2 + 1).contiguous(memory_format=CHANNELS_LAST)
    conv_weight = torch.randn(out_channels, size[1], *kernel)
    geometry = ([stride] * 2, list(padding), [dilation] * 2, 1)
    shape = reference.convolve(x, conv_weight, None, *geometry).shape
    mean, var = reference.batch_norm_stats(x)
    given = {
        "x": x, "mean": mean, "var": var, "geometry": geometry,
        "weight": torch.rand(size[1]) + 0.5, "bias": torch.rand(size[1]) + 0.5,
        "conv_weight": conv_weight.contiguous(memory_format=weight_format),
        "conv_bias": torch.randn(out_channels),
        "residual": torch.randn(shape).contiguous(memory_format=CHANNELS_LAST),
        "grad": torch.randn(shape), "grad_activation": torch.randn(size),
        "pending": torch.randn(shape), "coefficients": torch.randn(4, out_channels),
    }  # fmt: skip
    given = {
        k: rounded(v, dtype) if isinstance(v, torch.Tensor) and k not in VECTORS else v
        for k, v in given.items()
    }
    # z of a random value within a rounding of zero may fall on either side in two types.
    norm = [given[k].double() for k in ("mean", "var", "weight", "bias")]
    z = torch.nn.functional.batch_norm(given["x"].double(), *norm)
    moved = rounded(given["x"] + (0.01 if dtype == torch.float32 else 0.1), dtype)
    given["x"] = torch.where(z.abs() < 1e-4, moved, given["x"])
    given["x"] = given["x"].contiguous(memory_format=CHANNELS_LAST)
    found = run(OPS, given, dtype)
    eager = run(reference, given, dtype)
    exact = run(reference, given, torch.float64)
    if dtype != torch.float32:
        check_statistics_and_sums(found, given)
    for name, result in found.items():
        assert strides(result) == strides(eager[name]), name
        if result.dtype != dtype:
            continue
        assert_as_good_as_eager(name, result, eager[name], exact[name], magnitude(exact[name]))


@pytest.mark.parametrize("kernel", [1, 3])
def test_rounds_no_worse_than_the_library_over_large_maps(kernel):
    """In the Euclidean norm and without a floor: long sums of many pixels show here."""
    x = torch.randn(2, 64, 56, 56).contiguous(memory_format=CHANNELS_LAST)
    mean, var = reference.batch_norm_stats(x)
    conv_weight = torch.randn(64, 64, kernel, kernel) / (8 * kernel)
    grad = torch.randn_like(x)
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)

    def results(table, dtype):
        prefix = (*(t.to(dtype) for t in (x, mean, var)), None, None, 1e-5, conv_weight.to(dtype))
        output, *_ = table.batch_norm_relu_conv2d(*prefix, None, None, *geometry)
        backward = table.batch_norm_relu_conv2d_backward(
            grad.to(dtype), *prefix, None, *geometry, None, None
        )
        return output, *backward

    exact = results(reference, torch.float64)
    names = ("output", "grad_z", "grad_weight", "grad_bias", "grad_conv_weight")
    found, eager = results(OPS, torch.float32), results(reference, torch.float32)
    for name, ours, theirs, true in zip(names, found, eager, exact, strict=True):
        assert distance(ours, true) <= EAGER_FACTOR * distance(theirs, true), name


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written(dtype, channels):
    """Memory that held NaN before shows where nothing was written to it."""
    x = torch.randn(4, channels, 9, 7).contiguous(memory_format=CHANNELS_LAST).to(dtype)
    conv_weight = torch.randn(40, channels, 3, 3).to(dtype)
    prefix = (x, *OPS.batch_norm_stats(x), None, None, 1e-5, conv_weight)
    geometry = ([2, 2], [1, 1], [1, 1], 1)
    torch.use_deterministic_algorithms(True)
    try:
        output, *_ = OPS.batch_norm_relu_conv2d(*prefix, None, None, *geometry)
        results = OPS.batch_norm_relu_conv2d_backward(output, *prefix, None, *geometry)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(not tensor.isnan().any() for tensor in (output, *results))


def test_a_large_mean_does_not_cancel_in_the_statistics():
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    prefix = (x, *OPS.batch_norm_stats(x), None, None, 1e-5, torch.randn(16, 16, 3, 3) * 0.1)
    bias = torch.full((16,), 1e4)
    output, mean, var = OPS.batch_norm_relu_conv2d(*prefix, bias, None, [1, 1], [1, 1], [1, 1], 1)
    exact = reference.batch_norm_stats(output.double())
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact[1], rtol=1e-4, atol=0)


@pytest.mark.usefixtures("keeps_threads")
def test_a_batch_that_leaves_threads_idle_keeps_the_library():
    """In backward an image is one thread's work, except in a pointwise convolution, which divides
    pixels."""
    weight, pointwise = torch.randn(64, 64, 3, 3), torch.randn(64, 64, 1, 1)
    geometry, pointwise_geometry = [((1, 1), (p, p), (1, 1), 1) for p in (1, 0)]
    x = torch.randn(3, 64, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    for count in (1, 3, 4, 5):
        torch.set_num_threads(count)
        assert cpp.occupies_threads(x, weight, geometry, "backward") == (count <= 4)
        assert cpp.occupies_threads(x, pointwise, pointwise_geometry, "backward")


@pytest.mark.usefixtures("keeps_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 24, 40])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 1, 0, 1),
        (3, 2, 1, 1),
        (3, 1, 2, 2),
        (5, 2, 2, 1),
        (7, 1, 3, 1),
        (1, 2, 0, 1),
    ],
)
def test_bands_of_rows_give_what_whole_images_do(
    kernel, stride, padding, dilation, channels, dtype
):
    """With fewer images than threads a thread takes some rows of an image in forward."""
    generator = torch.Generator().manual_seed(0)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, 1)
    for batch, height in [(1, 17), (1, 40), (2, 33), (3, 64)]:
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((batch, channels, height, 19), (32, channels, kernel, kernel), (32,))
        )
        x = x.contiguous(memory_format=CHANNELS_LAST)
        vectors = (torch.ones(channels) * 0.1, torch.ones(channels), None, None)
        residual = torch.nn.functional.conv2d(x, weight * 0.1, None, *geometry)
        found = []
        for threads in (1, 8):
            torch.set_num_threads(threads)
            found.append(
                OPS.batch_norm_relu_conv2d(x, *vectors, 1e-5, weight, bias, residual, *geometry)
            )
        assert torch.equal(found[0][0], found[1][0])
        for one, other in zip(found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("keeps_threads")
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_threads_that_share_evenly_agree_and_others_nearly(kernel, dtype):
    """Sums of the gradients are one a chunk, and chunks are as many as threads share evenly."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, grad = (random(40, 32, 8, 8).contiguous(memory_format=CHANNELS_LAST) for _ in range(2))
    vectors = (0.1 * random(32), random(32).square() + 0.5, random(32), random(32))
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
    given = [x.to(dtype), *vectors, 1e-5, (0.1 * random(32, 32, kernel, kernel)).to(dtype)]
    found = {}
    for count in (1, 2, 4, 5, 8, 16, 20, 32, 48):
        torch.set_num_threads(count)
        forward = OPS.batch_norm_relu_conv2d(*given, None, None, *geometry)
        found[count] = [
            *forward,
            *OPS.batch_norm_relu_conv2d_backward(grad.to(dtype), *given, None, *geometry),
        ]
    maps = (0, 3)  # the result, and the masked gradient
    for count, results in found.items():
        for index, (first, result) in enumerate(zip(found[1], results, strict=True)):
            if count in (2, 4, 8, 16) or index in maps:
                assert torch.equal(first, result), (count, index)
            else:
                rtol = 1e-5 if first.dtype == torch.float32 else 1e-2
                torch.testing.assert_close(result, first, rtol=rtol, atol=1e-4)
    if kernel == 3 and dtype == torch.float32:  # of more weights there were 16 chunks
        assert not torch.equal(found[1][-1], found[32][-1])


@pytest.mark.usefixtures("keeps_threads")
@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_last_block_may_be_any_threads_first(channels, dtype):
    """What its thread computed before, infinities among it, must not be seen in its results."""
    torch.manual_seed(0)
    # 2009 pixels: 8 blocks of 252, of which the last lacks 7.
    x, grad = (
        torch.randn(41, channels, 7, 7).to(dtype).contiguous(memory_format=CHANNELS_LAST)
        for _ in range(2)
    )
    x[6:36:6, 3] = torch.inf
    vectors = (0.1 * torch.randn(channels), torch.rand(channels) + 0.5)
    weight = (0.1 * torch.randn(channels, channels, 1, 1)).to(dtype)
    given = (x, *vectors, None, None, 1e-5, weight)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    found = []
    for count in (1, 2, 4, 8) * 5:
        torch.set_num_threads(count)
        forward = OPS.batch_norm_relu_conv2d(*given, None, None, *geometry)
        backward = OPS.batch_norm_relu_conv2d_backward(grad, *given, None, *geometry)
        found.append((*forward, *backward))
    assert not found[0][0][:5].isnan().any(), "images without an infinity"
    for results in found[1:]:
        for first, result in zip(found[0], results, strict=True):
            torch.testing.assert_close(result, first, rtol=0, atol=0, equal_nan=True)
