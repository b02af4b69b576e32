"""The ops on a GPU through the CUDA library: the same checks as on the CPU, and CUDA's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import preact
from preact import reference
from preact.backends import cpp

from . import test_ops as cpu
from .tolerances import assert_as_good_as_eager, error, floor

OPS = torch.ops.preact
DEVICE = "cuda"
NAMES = [
    "batch_norm_stats",
    "batch_norm_relu",
    "identity_add",
    "batch_norm_relu_backward_reduce",
    "batch_norm_relu_backward_apply",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and cpp.why_not("cuda") != "",
        reason=f"no CUDA kernels: {cpp.why_not('cuda') if torch.cuda.is_available() else ''}",
    ),
]


@pytest.fixture(autouse=True)
def loaded():
    assert cpp.load("_C_cuda") == ""


def to_device(*values: object) -> list:
    return [
        tuple(to_device(*v)) if isinstance(v, tuple)
        else v.to(DEVICE) if isinstance(v, Tensor) else v
        for v in values
    ]  # fmt: skip


def calls(x: Tensor, grad: Tensor, skip: Tensor, vectors: tuple) -> dict[str, tuple]:
    """Arguments of every op; the sums are any numbers."""
    sums = tuple(torch.linspace(-1, 1, x.size(1)).to(vectors[0]) for _ in "ab")
    return {
        "batch_norm_stats": (x,),
        "identity_add": (x, skip),
        "batch_norm_relu": (x, *vectors, 1e-5),
        "batch_norm_relu_backward_reduce": (grad, x, *vectors, 1e-5),
        "batch_norm_relu_backward_apply": (grad, x, *vectors, *sums, skip, 1e-5),
    }


def results(name: str, arguments: tuple) -> tuple[Tensor, ...]:
    output = getattr(OPS, name)(*arguments)
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", cpu.LAYOUTS)
@pytest.mark.parametrize("shape", [*cpu.SHAPES, (0, 3, 4, 4), (2, 2100, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_every_op_equals_its_formula(dtype, shape, layout, affine):
    x, grad, skip, vectors = cpu.sample(shape, dtype, layout, affine)
    for name, arguments in calls(x, grad, skip, vectors).items():
        outputs = results(name, tuple(to_device(*arguments)))
        exact = [cpu.double(a) if isinstance(a, Tensor) else a for a in arguments]
        expected = getattr(reference, name)(*exact)
        expected = expected if isinstance(expected, tuple) else (expected,)
        if name == "identity_add":  # the statistics are those of the rounded sum
            expected = (expected[0], *reference.batch_norm_stats(outputs[0].cpu().double()))
        magnitudes = 1.0
        if name == "batch_norm_relu_backward_reduce":
            terms = reference.batch_norm_relu_backward_reduce(exact[0].abs(), *exact[1:])
            magnitudes = float(terms[1].max()) if x.numel() else 1.0
        for output, value in zip(outputs, expected, strict=True):
            if not x.numel():
                assert torch.equal(output.cpu().isnan(), value.isnan())
                continue
            scale = magnitudes + float(value.abs().max())
            spread = 32 * torch.finfo(reference.accumulate_dtype(dtype)).eps * scale
            assert error(output.cpu(), value) <= floor(output, value) + spread, name
    if x.numel():
        on_device = to_device(x, *vectors, 1e-5)
        output = OPS.batch_norm_relu(*on_device)
        passed = OPS.batch_norm_relu_backward_apply(
            torch.ones_like(output), *on_device[:-1], None, None, None, 1e-5
        )
        assert torch.equal(passed != 0, output > 0), "the backward's mask is not the forward's"
        assert output.stride() == OPS.batch_norm_relu(x, *vectors, 1e-5).stride()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", cpu.LAYOUTS)
def test_opcheck(name, layout):
    x, grad, skip, vectors = to_device(*cpu.sample((2, 3, 4, 5), torch.float32, layout, True))
    arguments = calls(x, grad, skip, vectors)[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_results_repeat_bit_for_bit_on_any_stream():
    x, grad, skip, vectors = to_device(
        *cpu.sample((32, 96, 28, 28), torch.float16, "channels_last", True)
    )
    for name, arguments in calls(x, grad, skip, vectors).items():
        first = results(name, arguments)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            again = results(name, arguments)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name


def test_ops_neither_wait_nor_break_a_graph():
    x, grad, skip, vectors = to_device(
        *cpu.sample((8, 16, 9, 9), torch.float32, "contiguous", True)
    )
    every = calls(x, grad, skip, vectors)
    expected = {name: results(name, arguments) for name, arguments in every.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, arguments in every.items():
            results(name, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = {name: results(name, arguments) for name, arguments in every.items()}
    graph.replay()
    torch.cuda.synchronize()
    for name in every:
        for a, b in zip(captured[name], expected[name], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_run_on_the_device_of_their_input():
    x = torch.randn(4, 3, 5, 5, device="cuda:1")
    with torch.cuda.device(0):
        mean, var = OPS.batch_norm_stats(x)
        assert torch.cuda.current_device() == 0
    assert mean.device == var.device == x.device
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_two_to_the_31_elements(channels_last):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    shape = (33, 64, 1024, 1024)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=layout).fill_(1)
    x[-1, -1, -1, -1] = 3
    vectors = (torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE), None, None)
    output = OPS.batch_norm_relu(x, *vectors, 1e-5)
    assert output[-1, -1, -1, -1] > 2
    assert output[0, 0, 0, 0] < 2
    mean, _ = OPS.batch_norm_stats(x)
    torch.testing.assert_close(mean, torch.ones_like(mean))


def test_a_model_trains_as_in_eager():
    torch.manual_seed(0)
    unit = preact.PreActBottleneck(64, 16).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(8, 64, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last)
    gradients = {}
    for backend in ("reference", "cpp"):
        unit.zero_grad()
        leaf = x.clone().requires_grad_()
        with preact.use_backend(backend):
            unit(leaf).square().sum().backward()
        gradients[backend] = [leaf.grad, *(p.grad for p in unit.parameters())]
    for eager, fused in zip(gradients["reference"], gradients["cpp"], strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_convolution(dtype, kernel, stride, pending, monkeypatch):
    """The matrix product (1x1) and what goes to the reference (3x3), as eager is to float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    last = torch.channels_last

    def image(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=last)

    x, weight = image(3, 72, 15, 14), (torch.randn(136, 72, kernel, kernel) / 9).to(dtype)
    vectors = (*reference.batch_norm_stats(x), torch.randn(72), torch.randn(72))
    geometry = (stride, (0, 0), (1, 1), 1)
    output_size = reference.convolve(x, weight, None, *geometry).shape
    residual, grad, following = (image(*output_size) for _ in range(3))
    conv_bias, coefficients = torch.randn(136).to(dtype), torch.randn(4, 136)
    extra = (following, coefficients) if pending else (None, None)
    given = {
        "batch_norm_relu_conv2d": (x, *vectors, 1e-5, weight, conv_bias, residual, *geometry),
        "batch_norm_relu_conv2d_backward": (
            grad, x, *vectors, 1e-5, weight, image(*x.shape), *geometry, *extra,
        ),
    }  # fmt: skip
    for name, arguments in given.items():
        on_device = to_device(*arguments)
        outputs = results(name, tuple(on_device))
        eager = getattr(reference, name)(*on_device)
        exact = getattr(reference, name)(
            *(cpu.double(a) if isinstance(a, Tensor) else a for a in arguments)
        )
        for index, (result, own, truth) in enumerate(zip(outputs, eager, exact, strict=True)):
            assert result.stride() == own.stride()
            spread = float(truth.abs().max()) * len(x) * 15 * 14 if result.dim() == 1 else 0.0
            assert_as_good_as_eager(f"{name} {index}", result.cpu(), own.cpu(), truth, spread)
        torch.library.opcheck(getattr(OPS, name).default, tuple(on_device))
        again = results(name, tuple(on_device))
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
