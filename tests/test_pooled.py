"""BN-ReLU in front of a pooling: its ops, its Function, and what ``fuse_`` makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import preact
from preact import pooled, reference, reference_pool
from preact.arguments import Conv, Norm, Pool
from preact.backends import available

from .op_checks import arrange, check, double, sample
from .test_training import bytes_kept
from .tolerances import assert_as_good_as_eager, magnitude

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

OPS = torch.ops.preact
CHANNELS_LAST = torch.channels_last
STEM = Pool((3, 3), (2, 2), (1, 1), False)
TRANSITION = Pool((2, 2), (2, 2), (0, 0), True)
POOLS = [
    STEM,
    TRANSITION,
    Pool((2, 2), (2, 2), (0, 0), False),
    Pool((3, 2), (2, 3), (1, 0), False),
    Pool((3, 3), (1, 1), (1, 1), False),
    Pool((1, 1), (2, 2), (0, 0), False),
    Pool((2, 3), (1, 2), (0, 0), True),
]


@pytest.fixture
def poison_unwritten_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_ops_equal_their_formulas(dtype, layout, pool, poison_unwritten_memory):
    for channels, size in ((3, (7, 8)), (16, (5, 4)), (71, (6, 9))):
        x, _, _, vectors = sample(OPS, (2, channels, *size), dtype, layout, channels != 16)
        exact = tuple(double(v) for v in vectors)
        output, positions = OPS.batch_norm_relu_pool2d(x, *vectors, 1e-5, *pool)
        wanted, places = reference_pool.batch_norm_relu_pool2d(x.double(), *exact, 1e-5, *pool)
        check("output", output, wanted)
        assert output.dtype == x.dtype
        assert output.is_contiguous(memory_format=reference.memory_format_of(x))
        assert torch.equal(positions, places)
        grad = arrange(torch.randn(output.shape).to(dtype), layout)
        for batch_stats in (True, False):
            options = (1e-5, batch_stats, *pool)
            found = OPS.batch_norm_relu_pool2d_backward(grad, positions, x, *vectors, *options)
            exactly = reference_pool.batch_norm_relu_pool2d_backward(
                grad.double(), positions, x.double(), *exact, *options
            )
            assert found[0].stride() == reference.preserve_layout(x, x).stride()
            terms = grad.double().abs().sum((0, 2, 3)).max() * magnitude(x.double())
            check("grad_input", found[0], exactly[0])
            for name, a, b in zip(
                ("grad_weight", "grad_bias"), found[1:], exactly[1:], strict=True
            ):
                assert (a - b).abs().max() <= 32 * torch.finfo(a.dtype).eps * (terms + 1), name


@pytest.mark.parametrize("pool", [STEM, TRANSITION], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, pool):
    x, _, _, vectors = sample(OPS, (2, 3, 4, 5), torch.float32, layout, True)
    forward = (x, *vectors, 1e-5, *pool)
    output, positions = OPS.batch_norm_relu_pool2d(*forward)
    torch.library.opcheck(OPS.batch_norm_relu_pool2d.default, forward)
    backward = (output, positions, x, *vectors, 1e-5, True, *pool)
    torch.library.opcheck(OPS.batch_norm_relu_pool2d_backward.default, backward)


def test_results_do_not_depend_on_the_number_of_threads():
    x, _, _, vectors = sample(OPS, (8, 24, 33, 31), torch.float32, "channels_last", True)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            output, positions = OPS.batch_norm_relu_pool2d(x, *vectors, 1e-5, *STEM)
            arguments = (output, positions, x, *vectors, 1e-5, True, *STEM)
            found.append((output, *OPS.batch_norm_relu_pool2d_backward(*arguments)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("pool", [STEM, TRANSITION], ids=str)
def test_nan_and_infinity_pass_as_in_eager(pool):
    x = torch.randn(2, 19, 6, 6)
    x[0, 3, 1, 2], x[1, 18, 0, 0], x[1, 2, 3, 3] = float("nan"), float("inf"), float("-inf")
    x = x.contiguous(memory_format=CHANNELS_LAST)
    vectors = (torch.zeros(19), torch.ones(19), None, None)
    output, _ = OPS.batch_norm_relu_pool2d(x, *vectors, 1e-5, *pool)
    expected = pooled.pooled(torch.relu(x), pool)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())


@pytest.mark.parametrize(
    ("message", "pool"),
    [
        ("kernel", Pool((9, 2), (1, 1), (0, 0), True)),
        ("padding", Pool((2, 2), (1, 1), (1, 1), True)),
        ("padding", Pool((2, 2), (1, 1), (2, 2), False)),
        ("stride", Pool((2, 2), (0, 1), (0, 0), False)),
    ],
)
def test_an_op_names_the_argument_it_refuses(message, pool):
    x, _, _, vectors = sample(OPS, (2, 3, 4, 5), torch.float32, "channels_last", True)
    with pytest.raises(RuntimeError, match=message):
        OPS.batch_norm_relu_pool2d(x, *vectors, 1e-5, *pool)


@pytest.mark.parametrize("with_conv", [False, True], ids=["pool", "conv"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pool", [STEM, TRANSITION], ids=str)
def test_first_and_second_order(pool, training, with_conv, fused_calls):
    if with_conv and not pool.average:
        pool = TRANSITION
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST)
    parameters = [torch.rand(3).double() + 0.5, torch.randn(3).double()]
    parameters += [torch.randn(2, 3, 1, 1).double(), torch.randn(2).double()]
    inputs = tuple(t.requires_grad_() for t in (x, *parameters))

    def call(x, weight, bias, kernel, conv_bias):
        running = (torch.full((3,), 0.2).double(), torch.full((3,), 1.5).double())
        norm = Norm(*running, weight, bias, training)
        conv = Conv(kernel, conv_bias) if with_conv else None
        # gradcheck moves x elsewhere in memory
        x = x.contiguous(memory_format=CHANNELS_LAST)
        return pooled.batch_norm_relu_pool2d(x, norm, pool, conv)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, fast_mode=True)
    assert fused_calls


@pytest.fixture
def fused_calls(monkeypatch):
    """Calls that ran as one pass."""
    calls = []
    whole = pooled.BatchNormReLUPool2d.apply
    monkeypatch.setattr(
        pooled.BatchNormReLUPool2d, "apply", lambda *a: calls.append(a) or whole(*a)
    )
    return calls


def transition() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1, bias=False), nn.AvgPool2d(2)
    )


def stem() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class MeanByFunction(nn.Module):
    """A transition as DenseNets for CIFAR have it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(24), nn.Conv2d(24, 12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


def everything(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.backward(grad.to(output.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {"output": output.detach(), "x": x.grad, **gradients, **buffers}


@pytest.mark.parametrize("make", [stem, transition, MeanByFunction])
@pytest.mark.parametrize("mode", ["train", "eval", "autocast", "pure bfloat16"])
def test_as_good_as_eager(mode, make, fused_calls):
    torch.manual_seed(0)
    eager = make().to(memory_format=CHANNELS_LAST).train(mode != "eval")
    for parameter in eager.parameters():
        nn.init.uniform_(parameter, -0.5, 1.5)
    if mode == "pure bfloat16":
        eager.bfloat16()
    exact, fused = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    assert preact.fuse_(fused).skipped == []
    x = torch.randn(4, 24, 15, 18) * 2 + 1
    grad = torch.randn_like(eager(x.to(next(eager.parameters()).dtype)).float())
    if mode in ("autocast", "pure bfloat16"):
        x, grad = x.bfloat16(), grad.bfloat16()
    x = x.contiguous(memory_format=CHANNELS_LAST)
    eager.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        found, plain = (everything(m, x, grad) for m in (fused, eager))
    wanted = everything(exact, x.double(), grad.double())
    assert len(fused_calls) == 1
    assert found["output"].dtype == plain["output"].dtype
    assert found["output"].is_contiguous(memory_format=CHANNELS_LAST)
    for name, result in found.items():
        terms = magnitude(wanted[name]) + (magnitude(grad) * grad[:, 0].numel()) ** 0.5
        assert_as_good_as_eager(name, result, plain[name], wanted[name], terms)


def test_other_layouts_and_devices_keep_the_order(fused_calls):
    eager = transition()
    fused = copy.deepcopy(eager)
    preact.fuse_(fused)
    x = torch.randn(2, 24, 6, 6)
    assert torch.allclose(fused(x), eager(x), atol=1e-6)
    assert not fused_calls
    with preact.use_backend("reference"):
        y = x.contiguous(memory_format=CHANNELS_LAST)
        assert torch.equal(fused(y), eager(y))
    assert not fused_calls


@pytest.mark.parametrize("make", [stem, transition])
def test_a_hook_or_changed_windows_are_seen(make, fused_calls):
    model = make()
    preact.fuse_(model)
    x = torch.randn(2, 24, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    model(x)
    assert len(fused_calls) == 1
    seen: list[int] = []
    handle = model[-1].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]
    assert len(fused_calls) == 1
    handle.remove()
    model[-1].kernel_size, model[-1].stride = 4, 4
    assert model(x).shape[2:] == (2, 2)


def test_bytes_saved_for_backward():
    for make, share in ((stem, 0.6), (transition, 0.6)):
        model = make()
        x = torch.randn(2, 24, 32, 32).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
        eager = bytes_kept(model, x)
        preact.fuse_(model)
        fused = bytes_kept(model, x)
        print(f"{make.__name__}: {fused / eager:.3f} of eager's bytes")
        assert fused <= share * eager


@pytest.mark.parametrize("make", [stem, transition])
def test_compiles_whole(make):
    model = make()
    preact.fuse_(model)
    x = torch.randn(2, 24, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    grad = torch.randn_like(model(x))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for a, b in zip(*(everything(m, x, grad).values() for m in (model, compiled)), strict=True):
        torch.testing.assert_close(a, b)
