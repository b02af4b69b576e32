"""The dense block in one buffer: its ops on channels of wider maps, its Function, and ``fuse_``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import preact
from preact import dense, reference, remembered
from preact.backends import available, cpu_capability
from preact.functional import Conv, Norm

from .test_training import bytes_kept
from .tolerances import (
    Runs,
    assert_as_good_as_eager,
    assert_same_in_float64,
    distance,
    magnitude,
)

torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

OPS = torch.ops.preact
CHANNELS_LAST = torch.channels_last


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)


# Channels of the wide map, first one and number of those read, output channels, kernel, size.
SLICES = [
    (100, 0, 40, 32, 1, (9, 11)),
    (70, 20, 33, 16, 3, (9, 11)),
    (40, 0, 24, 20, 3, (1, 1)),
    (64, 16, 48, 64, 1, (16, 17)),
    (49, 7, 16, 24, 3, (8, 5)),
    (90, 3, 71, 130, 1, (5, 7)),
    (130, 5, 100, 41, 1, (11, 13)),
]


NAMES = ("output", "mean", "var", "grad_input", "a", "b", "c")


def run_on_slices(table, given, dtype, weight_dtype):
    """Both ops, writing between the channels of maps filled with one number."""
    t = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in given.items()}
    accumulate = reference.accumulate_dtype(dtype)
    for name in ("coefficients", "grad_skip"):
        t[name] = given[name].to(accumulate)
    conv_weight = given["conv_weight"].to(weight_dtype)
    prefix = (t["x"][:, t["read"]], *t["vectors_of"](dtype), 1e-5, conv_weight)
    geometry = ([1, 1], [t["padding"]] * 2, [1, 1], 1)
    output, grad_input = t["output"].clone(), t["grad_skip"].clone()
    written, read = t["written"], t["read"]
    statistics = table.batch_norm_relu_conv2d_into(*prefix, *geometry, output[:, written])
    skip = t["grad_skip"][:, read]
    pending = (t["pending"][:, written], t["coefficients"])
    arguments = (t["grad"][:, written], *prefix, *geometry, *pending)
    sums = table.batch_norm_relu_conv2d_backward_add(*arguments, skip, grad_input[:, read])
    in_place = t["grad_skip"].clone()
    table.batch_norm_relu_conv2d_backward_add(*arguments, *[in_place[:, read]] * 2)
    assert torch.equal(in_place, grad_input)
    wide = (t["grad"].to(accumulate)[:, written], *prefix, None, *geometry, *pending)
    whole = table.batch_norm_relu_conv2d_backward(*wide)
    results = (output, *statistics, grad_input, *sums, *whole)
    return dict(zip((*NAMES, "grad_z", "d", "e", "f"), results, strict=True))


TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),
}
"""Of the maps and of the weights."""


@pytest.mark.parametrize("types", list(TYPES))
@pytest.mark.parametrize("case", SLICES, ids=str)
def test_ops_on_some_channels_of_wider_maps(case, types):
    dtype, weight_dtype = TYPES[types]
    width, first, channels, out_channels, kernel, size = case
    x = (channels_last(3, width, *size) * 2 + 1).to(dtype).float()
    read = slice(first, first + channels)
    mean, var = reference.batch_norm_stats(x[:, read])
    weight, bias = torch.rand(channels) + 0.5, torch.rand(channels) + 0.5
    # z of a random value within a rounding of zero may fall on either side in two types.
    norm = [v.double() for v in (mean, var, weight, bias)]
    z = torch.nn.functional.batch_norm(x[:, read].double(), *norm)
    x[:, read] = torch.where(z.abs() < 1e-4, x[:, read] + 0.5, x[:, read])
    maps = {
        name: channels_last(3, out_channels + 7, *size).to(dtype).float()
        for name in ("output", "grad", "pending")
    }
    given = {
        "x": x, "read": read, "written": slice(3, 3 + out_channels), "padding": kernel // 2,
        "vectors_of": lambda dtype: tuple(
            v.to(reference.accumulate_dtype(dtype)) for v in (mean, var, weight, bias)
        ),
        "conv_weight": torch.randn(out_channels, channels, kernel, kernel).to(dtype).float(),
        "coefficients": torch.randn(4, out_channels),
        "grad_skip": channels_last(3, width, *size).to(dtype).float(), **maps,
    }  # fmt: skip
    found = run_on_slices(OPS, given, dtype, weight_dtype)
    eager = run_on_slices(reference, given, dtype, weight_dtype)
    exact = run_on_slices(reference, given, torch.float64, torch.float64)
    assert found["c"].dtype == found["f"].dtype == weight_dtype
    for name, result in found.items():
        assert_as_good_as_eager(name, result, eager[name], exact[name], magnitude(exact[name]))
    beside = [channel for channel in range(width) if channel not in range(width)[read]]
    assert torch.equal(found["grad_input"][:, beside], given["grad_skip"][:, beside])
    given["output"] = given["output"].to(dtype)
    for edge in (slice(3), slice(3 + out_channels, None)):
        assert torch.equal(found["output"][:, edge], given["output"][:, edge])


@pytest.mark.parametrize("out_channels", [1, 3])
def test_an_expanded_gradient_is_no_slice(out_channels):
    x = channels_last(2, 16, 5, 6)
    prefix = (x, *reference.batch_norm_stats(x), None, None, 1e-5)
    arguments = (*prefix, torch.randn(out_channels, 16, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)
    expanded = torch.tensor(2.0).expand(2, out_channels, 5, 6)
    found = OPS.batch_norm_relu_conv2d_backward(expanded, *arguments)
    wanted = OPS.batch_norm_relu_conv2d_backward(expanded.contiguous(), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(autouse=True)
def one_thread():
    """The inputs are tiny: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [(True, True), (False, False), (False, True)], ids=str)
def test_first_and_second_order(training):
    inputs = [leaf(2, 2, 3, 2)]
    for read in (2, 3):
        inputs += [leaf(read), leaf(read), leaf(2, read, 1, 1), leaf(2), leaf(2), leaf(1, 2, 3, 3)]

    def norm(weight, bias, batch_stats):
        channels = weight.numel()
        running = (torch.linspace(-0.5, 0.5, channels), torch.linspace(0.5, 2, channels))
        return Norm(*(v.double() for v in running), weight, bias, batch_stats)

    def call(x, *p):
        layers = []
        for index in range(2):
            w1, b1, c1, w2, b2, c2 = p[6 * index : 6 * index + 6]
            first = norm(w1, b1, training[index])
            layers.append((first, Conv(c1), norm(w2, b2, training[1]), Conv(c2, None, 1, 1)))
        return dense.dense_block(x, layers)

    with preact.use_backend("cpp"):
        assert gradcheck(call, tuple(inputs), fast_mode=training != (True, True))
        assert gradgradcheck(call, tuple(inputs), fast_mode=True)


def block(growth: int = 8, drop_rate: float = 0.0) -> nn.Module:
    made = torchvision.models.densenet._DenseBlock(3, 24, 4, growth, drop_rate)
    for index, norm in enumerate(m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.fill_(0.1 * index)
    return made


@pytest.fixture
def fused_calls(monkeypatch):
    """How many blocks ran as one."""
    calls = []
    whole = dense.dense_block
    monkeypatch.setattr(dense, "dense_block", lambda *a: calls.append(a) or whole(*a))
    return calls


def everything(model, x, grad):
    """Output, gradients and buffers after one step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.backward(grad.to(output.dtype))
    parameters = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output, "x": x.grad, **parameters, **dict(model.named_buffers())}


@pytest.mark.parametrize(
    ("training", "size"), [(True, (9, 7)), (False, (9, 7)), (False, (1, 1))], ids=str
)
def test_as_good_as_eager(training, size, fused_calls):
    results, wanted, grad = run_fused_and_eager(0, training, size)
    assert len(fused_calls) == (size != (1, 1))
    judge(*results, wanted, grad)
    assert results[0]["output"].is_contiguous(memory_format=CHANNELS_LAST)


def run_fused_and_eager(seed, training, size):
    torch.manual_seed(seed)
    eager = block().train(training)
    exact, fused = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    report = preact.fuse_(fused)
    assert report.counts == {"dense_block": 6, "skipped": 0}
    x, grad = channels_last(4, 24, *size) * 2 + 1, channels_last(4, 48, *size)
    results = [everything(m, a, grad.to(a.dtype)) for m, a in ((fused, x), (eager, x))]
    return results, everything(exact, x.double(), grad.double()), grad


def test_maps_of_one_pixel_are_as_good_as_eager(fused_calls):
    """A norm over 4 values may divide by next to nothing."""
    runs = Runs()
    for seed in range(15):
        (found, eager), wanted, _ = run_fused_and_eager(seed, True, (1, 1))
        for name, result in found.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(result, wanted[name])
                continue
            runs.add(name, result, eager[name], wanted[name])
    assert not fused_calls  # such a map is in both layouts at once: layer by layer
    runs.assert_as_good_as_eager()


def judge(found, eager, wanted, grad):
    for name, result in found.items():
        terms = magnitude(wanted[name]) + (magnitude(grad) * grad[:, 0].numel()) ** 0.5
        if name.endswith("num_batches_tracked"):
            assert torch.equal(result, wanted[name])
        else:
            assert_as_good_as_eager(name, result, eager[name], wanted[name], terms)


@pytest.mark.parametrize("growth", [12, 24, 32, 48])
@pytest.mark.parametrize("mode", ["autocast", "pure", "eval", "few images"])
def test_bfloat16_as_good_as_eager(mode, growth, fused_calls):
    torch.manual_seed(0)
    if mode == "few images":
        torch.set_num_threads(2)
    eager = block(growth).to(memory_format=CHANNELS_LAST).train(mode != "eval")
    if mode == "pure":
        eager.bfloat16()
    exact, fused = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    preact.fuse_(fused)
    batch = 1 if mode == "few images" else 4
    x = (channels_last(batch, 24, 17, 15) * 2 + 1).bfloat16()
    grad = channels_last(batch, 24 + 3 * growth, 17, 15).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode != "pure"):
        results = [everything(m, x, grad) for m in (fused, eager)]
    wanted = everything(exact, x.double(), grad.double())
    assert len(fused_calls) == (cpu_capability() != "baseline")
    assert results[0]["output"].dtype == torch.bfloat16
    judge(*results, wanted, grad)


def test_bfloat16_gradient_of_the_input_stays_centred(fused_calls):
    """Each channel's gradient sums to zero, as a batch norm reads it: rounding must not lean."""
    torch.manual_seed(0)
    eager = block().to(memory_format=CHANNELS_LAST)
    fused = copy.deepcopy(eager)
    preact.fuse_(fused)
    x, grad = torch.rand(4, 24, 40, 40), torch.randn(4, 48, 40, 40)
    x, grad = (t.bfloat16().contiguous(memory_format=CHANNELS_LAST) for t in (x, grad))
    grad[:, :24] = 0  # what passes through is as it is
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (everything(m, x, grad)["x"].double() for m in (fused, eager))
    assert len(fused_calls) == (cpu_capability() != "baseline")
    leans, eagers = (magnitude(g.sum((0, 2, 3))) for g in (found, wanted))
    assert leans <= 2 * eagers, f"{leans:.3g}, eager's {eagers:.3g}"


def test_autocast_of_a_float32_input_gives_eagers_type(fused_calls):
    model = block()
    x = channels_last(2, 24, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x).dtype
        preact.fuse_(model)
        assert model(x).dtype == wanted == torch.float32, "what eager's concatenation promotes to"
    assert not fused_calls


def test_frozen_and_unfused_are_left_to_their_prefixes(fused_calls):
    model = block()
    preact.fuse_(model)
    x = channels_last(2, 24, 6, 6)
    model.denselayer1.conv1.requires_grad_(False)
    model(x).sum().backward()
    assert model.denselayer1.conv1.weight.grad is None
    model(x.contiguous(memory_format=torch.contiguous_format))
    with torch.autocast("cpu", torch.bfloat16):
        model(x.bfloat16())
    assert not fused_calls
    with torch.no_grad():
        model(x)
    assert len(fused_calls) == 1
    plain = preact.unfuse_(model)
    assert type(plain) is torchvision.models.densenet._DenseBlock


def test_hooks_dropout_and_checkpoints_take_the_layers_apart(fused_calls):
    x = channels_last(2, 24, 6, 6)
    model = block()
    preact.fuse_(model)
    seen = []
    handle = model.denselayer2.conv1.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]
    assert not fused_calls
    handle.remove()
    dropping = block(drop_rate=0.5)
    assert preact.fuse_(dropping).counts == {"batch_norm_relu_conv2d": 6, "skipped": 0}
    with torch.no_grad():
        dropping.eval()(x)
    assert len(fused_calls) == 1
    frugal = block()
    for layer in frugal.children():
        layer.memory_efficient = True
    report = preact.fuse_(frugal)
    assert "dense_block" not in report.counts
    frugal(x.requires_grad_())
    assert len(fused_calls) == 1


def test_timm(fused_calls):
    models = pytest.importorskip("timm.models.densenet")
    eager = models.DenseNet(8, (2, 3), num_classes=4).to(memory_format=CHANNELS_LAST)
    fused = copy.deepcopy(eager)
    assert preact.fuse_(fused).counts["dense_block"] == 10
    x, grad = channels_last(2, 3, 64, 64), torch.randn(2, 4)
    wanted = everything(eager, x, grad)
    found = everything(fused, x, grad)
    assert len(fused_calls) == 2
    assert found.keys() == wanted.keys()
    assert fused.state_dict().keys() == eager.state_dict().keys()
    assert distance(found["output"], wanted["output"]) < 1e-4


def test_three_steps_in_float64(monkeypatch):
    """The whole block in float64, which the automatic choice leaves to the prefixes."""
    monkeypatch.setattr(dense.plans, "fuses_convolution", lambda *_: True)
    monkeypatch.setattr(remembered, "_calls", {})
    torch.manual_seed(0)
    eager = block().double().to(memory_format=CHANNELS_LAST)
    fused = copy.deepcopy(eager)
    preact.fuse_(fused)
    for _ in range(3):
        x, grad = (channels_last(3, c, 6, 5).double() for c in (24, 48))
        wanted = everything(eager, x, grad)
        for name, result in everything(fused, x, grad).items():
            if not name.endswith("num_batches_tracked"):
                assert_same_in_float64(result, wanted[name])
        for model in (eager, fused):
            torch.optim.SGD(model.parameters(), 0.1).step()
            model.zero_grad()


def test_bytes_saved_for_backward():
    model = torchvision.models.densenet._DenseBlock(12, 64, 4, 32, 0.0)
    features = channels_last(2, 64, 9, 9).requires_grad_()
    eager = bytes_kept(model, features)
    preact.fuse_(model)
    fused = bytes_kept(model, features)
    print(f"{fused / eager:.3f} of eager's bytes")
    assert fused <= 0.4 * eager
