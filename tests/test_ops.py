"""Each op on the CPU against the formulas of ``reference`` in float64, in every type and layout."""

from __future__ import annotations

import pytest
import torch

import preact
from preact import reference
from preact.backends import available

from .op_checks import arrange, check_every_op, double, sample

OPS = torch.ops.preact
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (4, 16, 8, 8),
    (2, 3, 5, 7),
    (1, 17, 4, 9),
    (6, 1, 3, 3),
    (5, 33, 1, 1),
    (1, 24, 13, 1),
    (700, 8, 1, 2),
    (3, 5, 70, 71),
    (2, 300, 3, 5),
    (1, 1040, 3, 5),
    (1, 2053, 3, 5),
]
LAYOUTS = ["contiguous", "channels_last", "strided"]

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)


@pytest.fixture(autouse=True)
def poison_unwritten_memory():
    """Memory from ``torch.empty`` starts as NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_equals_its_formula(dtype, shape, layout, affine):
    check_every_op(OPS, sample(OPS, shape, dtype, layout, affine))


@pytest.mark.parametrize("channels", [8, 16, 64, 256])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (5.0, 0.1), (-300.0, 0.01), (0.0, 1e-6)])
def test_large_mean_small_variance(mean, std, layout, channels):
    x = arrange(torch.randn(16, channels, 24, 24, dtype=torch.float64) * std + mean, layout).float()
    result_mean, result_var = OPS.batch_norm_stats(x)
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    torch.testing.assert_close(result_mean.double(), expected_mean, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(result_var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("apart", [(8, 1, 1, 1), (1, 1, 1, 32)], ids=["images", "columns"])
def test_statistics_of_images_far_apart(apart, layout):
    """A shift that fits the first images, or a column, says nothing of the others."""
    x = torch.randn(8, 4, 20, 32) + 1e3 * torch.randn(apart)
    mean, var = OPS.batch_norm_stats(arrange(x, layout))
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    assert ((mean - expected_mean).abs() <= 1e-6 * expected_var.sqrt()).all()
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channel_has_no_variance(dtype, layout):
    x = arrange(torch.full((4, 5, 6, 6), 3.1).to(dtype), layout)
    mean, var = OPS.batch_norm_stats(x)
    assert torch.equal(var, torch.zeros_like(var))
    output = OPS.batch_norm_relu(x, mean, var, None, None, 1e-5)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_as_in_eager(dtype):
    x = torch.randn(2, 16, 4, 4)
    x[0, 3, 1, 2], x[1, 5, 0, 0] = float("nan"), float("inf")
    x = x.to(dtype)
    vectors = (torch.zeros(16), torch.ones(16), torch.ones(16), torch.zeros(16))
    for layout in ("contiguous", "channels_last"):
        output = OPS.batch_norm_relu(arrange(x, layout), *vectors, 1e-5)
        expected = torch.relu(torch.nn.functional.batch_norm(x.double(), *map(double, vectors)))
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_maps(dtype, shape, layout):
    x = arrange(torch.randn(shape).to(dtype), layout)
    vectors = (torch.ones(shape[1]),) * 4
    assert all(s.shape == (shape[1],) for s in OPS.batch_norm_stats(x))
    assert OPS.identity_add(x, x)[0].shape == shape
    assert OPS.batch_norm_relu(x, *vectors, 1e-5).shape == shape
    sums = OPS.batch_norm_relu_backward_reduce(x, x, *vectors, 1e-5)
    assert all(torch.equal(s, torch.zeros(shape[1])) for s in sums)
    assert OPS.batch_norm_relu_backward_apply(x, x, *vectors, *sums, x, 1e-5).shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 200, 1, 1), (1, 200, 2, 2), (2, 200, 3, 3)], ids=str)
def test_statistics_of_a_few_values_lose_no_digits(shape, layout):
    torch.manual_seed(0)
    x = arrange(torch.randn(shape) * 2 + 1, layout)
    exact = torch.var(x.double(), (0, 2, 3), unbiased=False)
    error = ((OPS.batch_norm_stats(x)[1].double() - exact) / exact).abs().max()
    assert error < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("expand", ["sum", "stride"])
def test_expanded_and_strided_gradients(expand):
    x, _, _, vectors = sample(OPS, (4, 6, 5, 5), torch.float32, "channels_last", True)
    grad = (
        torch.ones(()).expand(x.shape)
        if expand == "sum"
        else torch.randn(4, 5, 5, 6).permute(0, 3, 1, 2)
    )
    result = OPS.batch_norm_relu_backward_reduce(grad, x, *vectors, 1e-5)
    dense = OPS.batch_norm_relu_backward_reduce(grad.contiguous(), x, *vectors, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(result, dense, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_the_number_of_threads(layout):
    x, grad, skip, vectors = sample(OPS, (32, 24, 15, 15), torch.float32, layout, True)
    kernel = torch.randn(24, 24, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    prefix = (x, *vectors, 1e-5, kernel)
    calls = [
        lambda: OPS.batch_norm_stats(x),
        lambda: OPS.identity_add(x, skip),
        lambda: OPS.batch_norm_relu_backward_reduce(grad, x, *vectors, 1e-5),
    ]
    if layout == "channels_last":  # the others run the library's convolutions
        calls += [
            lambda: OPS.batch_norm_relu_conv2d(*prefix, None, skip, *geometry),
            lambda: OPS.batch_norm_relu_conv2d_backward(grad, *prefix, None, *geometry),
        ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [call() for call in calls]
        torch.set_num_threads(3)
        several = [call() for call in calls]
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(single, several, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(preact.ops.SCHEMAS))
def test_opcheck(name, layout):
    x, grad, skip, vectors = sample(OPS, (2, 3, 4, 5), torch.float32, layout, True)
    sums = (torch.randn(3), torch.randn(3))
    kernel = arrange(torch.randn(6, 1, 3, 2), layout)
    geometry = ([2, 1], [1, 0], [1, 2], 3)
    grad_output = arrange(torch.randn(2, 6, 2, 3), layout)
    backward = (grad_output, x, *vectors, 1e-5, kernel, *geometry)
    arguments = {
        "batch_norm_stats": (x,),
        "identity_add": (x, skip),
        "batch_norm_relu": (x, *vectors, 1e-5),
        "batch_norm_relu_backward_apply": (grad, x, *vectors, *sums, skip, 1e-5),
        "batch_norm_backward_coefficients": (x, *vectors[:3], *sums, 1e-5),
        "batch_norm_relu_conv2d": (x, *vectors, 1e-5, kernel, None, None, *geometry),
        "batch_norm_relu_conv2d_backward_input": backward,
        "batch_norm_relu_conv2d_backward_weight": backward,
        "batch_norm_relu_conv2d_into": (*backward[1:], torch.empty_like(grad_output)),
        "batch_norm_relu_conv2d_backward_add": (*backward, None, None, grad, torch.empty_like(x)),
        "batch_norm_relu_conv2d_backward": (*backward[:8], x, *geometry),
    }.get(name, (grad, x, *vectors, 1e-5))
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("other", lambda x: OPS.identity_add(x, x[:1])),
        ("mean", lambda x: OPS.batch_norm_relu(x, torch.ones(2), torch.ones(3), None, None, 1e-5)),
        ("input", lambda x: OPS.batch_norm_stats(x.int())),
        (
            "grad_output",
            lambda x: OPS.batch_norm_relu_backward_reduce(
                x.double(), x, torch.ones(3), torch.ones(3), None, None, 1e-5
            ),
        ),
        (
            "grad_skip",
            lambda x: OPS.batch_norm_relu_backward_apply(
                x, x, torch.ones(3), torch.ones(3), None, None, None, None, x[:, :2], 1e-5
            ),
        ),
    ],
)
def test_an_op_names_the_argument_it_refuses(argument, call):
    with pytest.raises(RuntimeError, match=argument):
        call(torch.randn(2, 3, 4, 4))
