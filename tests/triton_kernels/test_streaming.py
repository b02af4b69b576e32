"""The streaming kernels against the formulas in float64, at shapes that leave every tile ragged."""

from __future__ import annotations

import itertools

import pytest
import torch

from preact import ops, reference, tuning
from preact.backends import available
from preact.triton_kernels._maps import Config

from ..op_checks import arrange, check, check_every_op, double, sample

OPS = torch.ops.preact_triton
STREAMING = [name for name in ops.SCHEMAS if "conv" not in name and "coefficients" not in name]
SHAPES = [
    (4, 16, 8, 8),  # divisible by everything
    (2, 3, 5, 7),
    (1, 17, 4, 9),  # a single image, whose lines are split
    (6, 1, 3, 3),
    (5, 33, 1, 1),
    (1, 24, 13, 1),
    (700, 8, 1, 2),
    (3, 5, 70, 71),  # several tiles in every direction
    (2, 80, 6, 6),  # several tiles of channels
]
LAYOUTS = ["contiguous", "channels_last", "strided"]
HALF = [torch.bfloat16, torch.float16]


def test_nothing_is_missing_here(device):
    assert available(device.type)["triton"] == ""


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "affine"),
    [
        *((shape, layout, torch.float32, True) for shape in SHAPES for layout in LAYOUTS),
        *itertools.product(SHAPES[2:9:3], LAYOUTS[:2], HALF, [False]),
        *itertools.product(SHAPES[:2], LAYOUTS[1:], [*HALF, torch.float64], [True]),
    ],
    ids=str,
)
def test_every_op_equals_its_formula(shape, layout, dtype, affine, device):
    check_every_op(OPS, sample(OPS, shape, dtype, layout, affine, device))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(9, 6, 5, 7), (1, 3, 21, 9), (40, 5, 2, 2)], ids=str)
def test_many_small_tiles(shape, layout, device, monkeypatch):
    """Tiles of 32 elements: every reduction has several steps, splits and levels of merging."""
    small = Config(32, 1, 4)
    monkeypatch.setattr(tuning, "select", lambda *_: small)
    check_every_op(OPS, sample(OPS, shape, torch.float32, layout, True, device))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (5.0, 0.1), (0.0, 1e-6)])
def test_large_mean_small_variance(mean, std, layout, device):
    x = arrange(torch.randn(16, 8, 24, 24, dtype=torch.float64) * std + mean, layout)
    x = x.to(device, torch.float32)
    result_mean, result_var = OPS.batch_norm_stats(x)
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    torch.testing.assert_close(result_mean.double(), expected_mean, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(result_var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_statistics_of_images_far_apart(layout, device):
    """A shift that fits the first images says nothing of the later ones."""
    x = (torch.randn(8, 4, 20, 20) + 1e3 * torch.randn(8, 1, 1, 1)).to(device)
    mean, var = OPS.batch_norm_stats(arrange(x, layout))
    expected_mean, expected_var = reference.batch_norm_stats(x.double())
    assert ((mean - expected_mean).abs() <= 1e-6 * expected_var.sqrt()).all()
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_constant_channel_has_no_variance(dtype, layout, device):
    x = arrange(torch.full((9, 5, 16, 16), 3.1).to(device, dtype), layout)
    mean, var = OPS.batch_norm_stats(x)
    assert torch.equal(var, torch.zeros_like(var))
    output = OPS.batch_norm_relu(x, mean, var, None, None, 1e-5)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_infinity_pass_as_in_eager(layout, device):
    x = torch.randn(2, 16, 4, 4)
    x[0, 3, 1, 2], x[1, 5, 0, 0] = float("nan"), float("inf")
    x = arrange(x, layout).to(device)
    vectors = [v.to(device) for v in (torch.zeros(16), torch.ones(16), torch.ones(16))]
    output = OPS.batch_norm_relu(x, *vectors, None, 1e-5)
    expected = torch.relu(torch.nn.functional.batch_norm(x.double(), *map(double, vectors)))
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())
    mean, var = OPS.batch_norm_stats(x)
    assert torch.equal(
        mean.isfinite(), torch.tensor([c not in (3, 5) for c in range(16)], device=device)
    )
    assert var[[3, 5]].isnan().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_vectors_in_the_type_of_the_map(dtype, device):
    """Running statistics and parameters of a model in half precision are used in float32."""
    x, grad, skip, vectors = sample(OPS, (3, 7, 5, 6), dtype, "channels_last", True, device)
    half = tuple(v.to(dtype) for v in vectors)
    for op, given in (
        ("batch_norm_relu", (x, *half)),
        ("batch_norm_relu_backward_apply", (grad, x, *half, None, None, skip)),
    ):
        wide = (v if v is None else v.double() for v in given)
        check(op, getattr(OPS, op)(*given, 1e-5), getattr(reference, op)(*wide, 1e-5))


@pytest.mark.parametrize("expand", ["sum", "stride"])
def test_expanded_and_strided_gradients(expand, device):
    x, _, _, vectors = sample(OPS, (4, 6, 5, 5), torch.float32, "channels_last", True, device)
    grad = (
        torch.ones((), device=device).expand(x.shape)
        if expand == "sum"
        else torch.randn(4, 5, 5, 6).to(device).permute(0, 3, 1, 2)
    )
    for name, rest in (
        ("batch_norm_relu_backward_reduce", ()),
        ("batch_norm_relu_backward_apply", (None, None, grad)),
    ):
        results = getattr(OPS, name)(grad, x, *vectors, *rest, 1e-5)
        dense = getattr(OPS, name)(grad.contiguous(), x, *vectors, *rest, 1e-5)
        for a, b in zip(results, dense, strict=True):
            assert torch.equal(a, b)


def test_a_view_at_an_odd_address(device):
    """The launch is then specialised on less than sixteen bytes."""
    x = torch.randn(1 + 2 * 16 * 9, device=device)[1:].view(2, 16, 3, 3)
    assert x.data_ptr() % 16
    check_every_op(OPS, (x, x * 2, x + 1, (*OPS.batch_norm_stats(x), None, None)))


def test_repeats_bit_for_bit(device):
    x, grad, _, vectors = sample(OPS, (9, 24, 15, 15), torch.float32, "channels_last", True, device)
    calls = (
        lambda: OPS.batch_norm_stats(x),
        lambda: OPS.identity_add(x, grad),
        lambda: OPS.batch_norm_relu_backward_reduce(grad, x, *vectors, 1e-5),
    )
    for call in calls:
        for first, second in zip(call(), call(), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STREAMING)
def test_opcheck(name, layout, device):
    x, grad, skip, vectors = sample(OPS, (2, 3, 4, 5), torch.float32, layout, True, device)
    sums = tuple(torch.randn(3).to(device) for _ in range(2))
    arguments = {
        "batch_norm_stats": (x,),
        "identity_add": (x, skip),
        "batch_norm_relu": (x, *vectors, 1e-5),
        "batch_norm_relu_backward_apply": (grad, x, *vectors, *sums, skip, 1e-5),
    }.get(name, (grad, x, *vectors, 1e-5))
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("other", lambda x, one: OPS.identity_add(x, x[:1])),
        ("mean", lambda x, one: OPS.batch_norm_relu(x, one[:2], one, None, None, 1e-5)),
        ("grad_output", lambda x, one: OPS.batch_norm_relu_backward_reduce(
            x.half(), x, one, one, None, None, 1e-5)),
        ("grad_skip", lambda x, one: OPS.batch_norm_relu_backward_apply(
            x, x, one, one, None, None, None, None, x[:, :2], 1e-5)),
    ],
)  # fmt: skip
def test_an_op_names_the_argument_it_refuses(argument, call, device):
    with pytest.raises(RuntimeError, match=argument):
        call(torch.randn(2, 3, 4, 4).to(device), torch.ones(3).to(device))


def test_empty_maps(device):
    x = torch.empty(0, 3, 4, 4, device=device)
    assert OPS.batch_norm_relu(x, *torch.ones(2, 3).to(device), None, None, 1e-5).shape == x.shape
