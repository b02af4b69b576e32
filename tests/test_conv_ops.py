"""The fused convolution's ops: their formulas against autograd of the eager composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from preact import reference

from .tolerances import assert_as_good_as_eager

OPS = torch.ops.preact
GEOMETRIES = [
    # out channels, kernel, stride, padding, dilation, groups
    (5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (7, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (6, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (4, (2, 3), (1, 2), (0, 3), (2, 1), 4),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def sample(out_channels, kernel, stride, padding, dilation, groups, dtype, memory_format):
    """Everything one prefix and the norm after it read, by name."""

    def make(*shape):
        tensor = torch.randn(shape).to(dtype)
        return tensor.contiguous(memory_format=memory_format) if len(shape) == 4 else tensor

    x = make(2, 8, 7, 6) * 2 + 1
    mean, var = reference.batch_norm_stats(x)
    conv_weight = make(out_channels, 8 // groups, *kernel)
    geometry = (stride, padding, dilation, groups)
    output = reference.convolve(x, conv_weight, None, *geometry)
    return {
        "x": x,
        "vectors": (mean, var, make(8).float(), make(8).float() + 0.5),
        "conv_weight": conv_weight,
        "conv_bias": make(out_channels),
        "residual": make(*output.shape),
        "geometry": geometry,
    }


def eager(x, weight, bias, conv_weight, conv_bias, residual, geometry):
    activation = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
    output = F.conv2d(activation, conv_weight, conv_bias, *geometry)
    return output if residual is None else output + residual


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formulas_equal_autograd_of_the_composition(dtype, geometry, memory_format):
    given = sample(*geometry, dtype, memory_format)
    x, vectors, conv_weight = given["x"], given["vectors"], given["conv_weight"]
    forward = (conv_weight, given["conv_bias"], given["residual"])

    output, mean, var = OPS.batch_norm_relu_conv2d(x, *vectors, 1e-5, *forward, *given["geometry"])
    assert output.is_contiguous(memory_format=memory_format)
    found = {}
    leaves = {}
    for name, kind in (("eager", dtype), ("exact", torch.float64)):
        leaf = [t.detach().to(kind).requires_grad_() for t in (x, conv_weight)]
        norm = [t.detach().to(torch.float64 if name == "exact" else t.dtype) for t in vectors[2:]]
        leaf += [t.requires_grad_() for t in norm]
        leaves[name] = leaf
        found[name] = eager(
            leaf[0], *leaf[2:], leaf[1], *(t.to(kind) for t in forward[1:]), given["geometry"]
        )
    assert_as_good_as_eager("output", output, found["eager"], found["exact"])
    torch.testing.assert_close(mean, reference.batch_norm_stats(output.double())[0].float())
    torch.testing.assert_close(var, reference.batch_norm_stats(output.double())[1].float())

    grad = torch.randn_like(output)
    backward = (grad, x, *vectors, 1e-5, conv_weight, *given["geometry"])
    grad_z, *sums = OPS.batch_norm_relu_conv2d_backward_input(*backward)
    grad_x = OPS.batch_norm_relu_backward_apply(grad_z, x, *vectors, *sums, None, 1e-5)
    grad_conv = OPS.batch_norm_relu_conv2d_backward_weight(*backward)
    assert grad_z.is_contiguous(memory_format=memory_format)
    assert not grad_z[OPS.batch_norm_relu(x, *vectors, 1e-5) == 0].any()
    wanted = {
        name: torch.autograd.grad(found[name], leaves[name], grad.to(found[name].dtype))
        for name in found
    }
    for name, result, index in (
        ("grad_input", grad_x, 0), ("grad_conv_weight", grad_conv, 1),
        ("grad_weight", sums[0], 2), ("grad_bias", sums[1], 3),
    ):  # fmt: skip
        parts = (wanted["eager"][index], wanted["exact"][index])
        assert_as_good_as_eager(name, result, *parts)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_a_pending_gradient_is_the_applied_one(batch_stats):
    given = sample(*GEOMETRIES[2], torch.float64, torch.channels_last)
    x, vectors, conv_weight = given["x"], given["vectors"], given["conv_weight"]
    following = given["residual"] * 3 + 2
    mean, var = reference.batch_norm_stats(following)
    weight = torch.randn(following.size(1), dtype=torch.float64)
    norm = (mean, var, weight, None)
    dz = torch.randn_like(following) * (OPS.batch_norm_relu(following, *norm, 1e-5) > 0)
    sums = OPS.batch_norm_relu_backward_reduce(dz, following, *norm, 1e-5)
    sums = sums if batch_stats else (None, None)
    grad = OPS.batch_norm_relu_backward_apply(dz, following, *norm, *sums, None, 1e-5)
    coefficients = OPS.batch_norm_backward_coefficients(following, *norm[:3], *sums, 1e-5)

    rest = (x, *vectors, 1e-5, conv_weight, *given["geometry"])
    for op in (
        OPS.batch_norm_relu_conv2d_backward_input, OPS.batch_norm_relu_conv2d_backward_weight,
    ):  # fmt: skip
        applied = op(grad, *rest)
        pending = op(dz, *rest, following, coefficients)
        torch.testing.assert_close(pending, applied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "out_channels", "kernel", "size"),
    [(64, 32, 1, (11, 13)), (96, 64, 1, (3, 5)), (64, 32, 3, (7, 9)), (40, 24, 1, (15, 15))],
    ids=str,
)
def test_what_a_call_leaves_in_the_scratch_does_not_count(
    channels, out_channels, kernel, size, dtype
):
    def maps(channels, value):
        made = torch.randn(3, channels, *size).to(dtype) * value
        return made.contiguous(memory_format=torch.channels_last)

    def run(x, grad):
        vectors = (torch.zeros(channels), torch.ones(channels), None, None, 1e-5)
        geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
        weight = torch.ones(out_channels, channels, kernel, kernel, dtype=dtype) / channels
        output = OPS.batch_norm_relu_conv2d(x, *vectors, weight, None, None, *geometry)
        backward = OPS.batch_norm_relu_conv2d_backward(grad, x, *vectors, weight, None, *geometry)
        return (*output, *backward)

    given = maps(channels, 1), maps(out_channels, 1)
    before = run(*given)
    run(maps(channels, float("nan")), maps(out_channels, float("nan")))
    for a, b in zip(before, run(*given), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
