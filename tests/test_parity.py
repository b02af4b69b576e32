"""Functions and modules, forward and backward, against eager in float64 and eager's own error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import preact
from preact import functional as PF
from preact.backends import available

from .tolerances import assert_as_good_as_eager, magnitude

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Case = Callable[..., tuple[Tensor, ...]]


def evaluate(
    case: Case,
    tensors: Sequence[Tensor | None],
    running: Sequence[Tensor],
    grads: Sequence[Tensor],
    dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor | None]:
    """Results, gradients of every tensor, and the running statistics afterwards."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach().clone() if dtype is None else tensor.detach().to(dtype)
        return tensor.requires_grad_()

    inputs = [cast(tensor) for tensor in tensors]
    buffers = [buffer.clone() if dtype is None else buffer.to(dtype) for buffer in running]
    with preact.use_backend(backend):
        outputs = case(inputs, buffers)
        torch.autograd.backward(
            outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)]
        )
    return [*outputs, *(None if t is None else t.grad for t in inputs), *buffers]


def compare(
    case: Case,
    tensors: Sequence[Tensor | None],
    running: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    exact = evaluate(case, tensors, running, grads, torch.float64, "reference")
    eager = evaluate(case, tensors, running, grads, None, "reference")
    fused = evaluate(case, tensors, running, grads, None, "cpp")
    incoming = max(magnitude(grad) for grad in grads)
    for index, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        assert_as_good_as_eager(f"result {index}", a, b, c, incoming)


def randn(*shape: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    tensor = torch.randn(shape).to(dtype)
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor


def norm_vectors(channels: int, dtype: torch.dtype, affine: bool) -> tuple[list, list[Tensor]]:
    """weight and bias (β well above zero, so padding would show), running mean and variance."""
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(channels, dtype=vector) + 0.5
    bias = torch.rand(channels, dtype=vector) + 0.5
    running = [torch.randn(channels, dtype=vector), torch.rand(channels, dtype=vector) + 0.5]
    return ([weight, bias] if affine else [None, None]), running


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 3, 5, 7), (2, 17, 4, 4), (8, 1, 3, 3), (6, 32, 1, 1)], ids=str
)
def test_batch_norm_relu(shape, dtype, layout, training):
    vectors, running = norm_vectors(shape[1], dtype, affine=shape[1] != 17)
    x = randn(*shape, dtype=dtype, layout=layout)
    grad = randn(*shape, dtype=dtype, layout=layout)

    def case(inputs, buffers):
        return (PF.batch_norm_relu(inputs[0], *buffers, *inputs[1:], training, 0.3, 1e-4),)

    compare(case, [x, *vectors], running, [grad])


GEOMETRIES = {
    "1x1": {"kernel": 1},
    "1x1 stride 2": {"kernel": 1, "stride": 2},
    "3x3": {"kernel": 3, "padding": 1},
    "3x3 stride 2 dilated": {"kernel": 3, "stride": 2, "padding": 2, "dilation": 2},
    "grouped with bias": {"kernel": 3, "padding": 1, "groups": 3, "bias": True},
    "uneven": {"kernel": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    "same": {"kernel": 3, "padding": "same"},
    "even same": {"kernel": 2, "padding": "same"},
}


@pytest.mark.parametrize("save_activation", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_batch_norm_relu_conv2d(name, training, save_activation):
    geometry = dict(GEOMETRIES[name])
    kernel = geometry.pop("kernel")
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    with_bias = geometry.pop("bias", False)
    for layout, (batch, size) in itertools.product(LAYOUTS, [(3, (7, 5)), (1, (6, 9))]):
        vectors, running = norm_vectors(6, torch.float32, affine=True)
        x = randn(batch, 6, *size, dtype=torch.float32, layout=layout)
        weight = torch.randn(9, 6 // geometry.get("groups", 1), *kernel)
        bias = torch.randn(9) if with_bias else None
        shape = torch.nn.functional.conv2d(x, weight, bias, **geometry).shape
        residual = randn(*shape, dtype=torch.float32, layout=layout)

        def case(inputs, buffers):
            x, bn_weight, bn_bias, conv_weight, conv_bias, residual = inputs
            return (
                PF.batch_norm_relu_conv2d(
                    x, *buffers, bn_weight, bn_bias, conv_weight, conv_bias,
                    training=training, residual=residual, save_activation=save_activation,
                    **geometry,
                ),
            )  # fmt: skip

        compare(case, [x, *vectors, weight, bias, residual], running, [torch.randn(shape)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_shared_activation_in_other_types(dtype, layout):
    vectors, running = norm_vectors(8, dtype, affine=True)
    x = randn(2, 8, 6, 6, dtype=dtype, layout=layout)
    first, second = torch.randn(4, 8, 3, 3).to(dtype), torch.randn(5, 8, 1, 1).to(dtype)
    grads = [torch.randn(2, 4, 6, 6), torch.randn(2, 5, 3, 3)]

    def case(inputs, buffers):
        x, weight, bias, first, second = inputs
        norm = PF.Norm(*buffers, weight, bias, True)
        convs = [PF.Conv(first, None, 1, 1), PF.Conv(second, None, 2)]
        return PF.batch_norm_relu_convs2d(x, norm, convs)[0]

    compare(case, [x, *vectors, first, second], running, grads)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 1, 1, 1), (5, 4, 6, 3)], ids=str)
@pytest.mark.parametrize("residual", ["same", "broadcast", "none"])
def test_residuals_and_small_inputs(shape, residual):
    training = shape[0] > 1
    vectors, running = norm_vectors(shape[1], torch.float32, affine=True)
    weight = torch.randn(3, shape[1], 3, 3)
    out = (shape[0], 3, *shape[2:])
    other = {"same": torch.randn(out), "broadcast": torch.randn(1, 3, 1, 1), "none": None}[residual]

    def case(inputs, buffers):
        x, bn_weight, bn_bias, weight, other = inputs
        return (
            PF.batch_norm_relu_conv2d(
                x,
                *buffers,
                bn_weight,
                bn_bias,
                weight,
                padding=1,
                training=training,
                residual=other,
            ),
        )

    # Two values that happen to lie close together would test the condition of the problem instead.
    count = torch.Size(shape).numel()
    x = (torch.linspace(-1, 1, count)[torch.randperm(count)] + 0.1 * torch.randn(count)).view(shape)
    compare(case, [x, *vectors, weight, other], running, [torch.randn(out)])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("unit", [preact.PreActBasicBlock, preact.PreActBottleneck])
@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (8, 1), (16, 2)])
def test_residual_unit(unit, channels, stride, layout, training):
    module = unit(
        16 if stride > 1 or channels != 16 else channels * unit.expansion, channels, stride
    )
    module.train(training)
    state = list(module.state_dict().values())
    for value in state:
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    x = randn(3, next(module.parameters()).size(0), 8, 6, dtype=torch.float32, layout=layout)
    grad = torch.randn_like(module(x))

    def case(inputs, _):
        copies = dict(zip((name for name, _ in module.named_parameters()), inputs[1:], strict=True))
        buffers = {k: v.to(inputs[0].dtype) if v.is_floating_point() else v.clone()
                   for k, v in module.named_buffers()}  # fmt: skip
        output = torch.func.functional_call(module, {**copies, **buffers}, (inputs[0],))
        return (output,)

    compare(case, [x, *module.parameters()], [], [grad])


@pytest.mark.parametrize("grad", ["expanded", "strided"])
def test_incoming_gradients_of_any_layout(grad):
    vectors, running = norm_vectors(6, torch.float32, affine=True)
    x, weight = torch.randn(4, 6, 8, 8), torch.randn(5, 6, 3, 3)
    grads = {
        "expanded": torch.ones(()).expand(4, 5, 8, 8),
        "strided": torch.randn(8, 8, 5, 4).permute(3, 2, 0, 1),
    }[grad]

    def case(inputs, buffers):
        x, bn_weight, bn_bias, weight = inputs
        return (
            PF.batch_norm_relu_conv2d(
                x, *buffers, bn_weight, bn_bias, weight, padding=1, training=True
            ),
        )

    compare(case, [x, *vectors, weight], running, [grads])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_mean_far_above_the_standard_deviation(layout):
    vectors, running = norm_vectors(8, torch.float32, affine=True)
    x = randn(4, 8, 9, 9, dtype=torch.float32, layout=layout) + 1e4

    def case(inputs, buffers):
        return (PF.batch_norm_relu(inputs[0], *buffers, *inputs[1:], True),)

    # Rounding the mean to float32 moves z by 5e-4: where z is nearer to zero than that, any two
    # implementations may disagree on the mask. No gradient enters there.
    z = torch.nn.functional.batch_norm(
        x.double(), None, None, *(v.double() for v in vectors), training=True
    )
    grad = torch.where(z.abs() > 1e-2, torch.randn_like(x), 0)
    compare(case, [x, *vectors], running, [grad])


def test_statistics_handed_on_equal_those_taken():
    unit = preact.PreActBasicBlock(16, 16)
    x = torch.randn(4, 16, 8, 8)
    output, statistics = unit(x, return_statistics=True)
    taken = torch.ops.preact.batch_norm_stats(output.detach())
    for handed_on, own in zip(statistics, taken, strict=True):
        torch.testing.assert_close(handed_on, own, rtol=1e-6, atol=1e-7)
    follower = preact.PreActBasicBlock(16, 16)
    torch.testing.assert_close(follower(output, statistics), follower(output))


@pytest.mark.parametrize("model", ["unit", "prefix", "norm"])
def test_autocast_bfloat16_matches_eager(model):
    """BN runs in the input's type, convolutions in bfloat16, gradients in the parameters' types."""
    module = {
        "unit": lambda: preact.PreActBasicBlock(16, 32, 2),
        "prefix": lambda: preact.BatchNormReLUConv2d(16, 8, 3, padding=1, bias=True),
        "norm": lambda: preact.BatchNormReLU2d(16),
    }[model]()
    for dtype in (torch.float32, torch.bfloat16):
        results = {}
        x = torch.randn(4, 16, 8, 8).to(dtype)
        for backend in ("reference", "cpp"):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            with preact.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
                output = module(leaf)
            output.float().square().sum().backward()
            results[backend] = [output, leaf.grad, *(p.grad for p in module.parameters())]
        for eager, fused in zip(results["reference"], results["cpp"], strict=True):
            assert eager.dtype == fused.dtype
            scale = magnitude(eager)
            torch.testing.assert_close(fused, eager, rtol=2e-2, atol=2e-2 * scale)
