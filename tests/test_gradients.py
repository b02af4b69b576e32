"""Finite differences for every Function, second order included; no gradient nobody asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import preact
from preact import functional as PF
from preact.backends import available

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def norm(weight: Tensor, bias: Tensor, training: bool) -> PF.Norm:
    """Fresh running statistics at every evaluation: finite differences must not see an update."""
    channels = weight.numel()
    running = (
        torch.linspace(-0.5, 0.5, channels).double(),
        torch.linspace(0.5, 2, channels).double(),
    )
    return PF.Norm(*running, weight, bias, training)


def batch_norm_relu(training):
    inputs = (leaf(3, 2, 3, 2), leaf(2), leaf(2))
    return inputs, lambda x, w, b: PF.batch_norm_relu(x, *norm(w, b, training)[:2], w, b, training)


def prefix(training, save_activation=False):
    inputs = (
        leaf(2, 2, 3, 3), leaf(2), leaf(2), leaf(3, 2, 3, 3), leaf(3), leaf(2, 2, 1, 1),
        leaf(2, 3, 3, 3),
    )  # fmt: skip

    def call(x, w, b, first, first_bias, second, residual):
        convs = [PF.Conv(first, first_bias, 1, 1), PF.Conv(second, None, 2)]
        return PF.batch_norm_relu_convs2d(
            x, norm(w, b, training), convs, residual=residual, save_activation=save_activation
        )[0]

    return inputs, call


def unit(training, projection=False, save_activation=False):
    inputs = [
        leaf(2, 2, 3, 3), leaf(2), leaf(2), leaf(3, 2, 3, 3), leaf(3), leaf(3), leaf(2, 3, 3, 3),
    ]  # fmt: skip
    if projection:
        inputs.append(leaf(2, 2, 1, 1))

    def call(x, w1, b1, c1, w2, b2, c2, p=None):
        stride = 1 if p is None else 2
        layers = [
            (norm(w1, b1, training), PF.Conv(c1, None, stride, 1)),
            (norm(w2, b2, training), PF.Conv(c2, None, 1, 1)),
        ]
        return PF.residual_unit(
            x, layers, None if p is None else PF.Conv(p, None, 2),
            return_statistics=training, save_activation=save_activation,
        )[0]  # fmt: skip

    return tuple(inputs), call


def identity_add(_):
    return (leaf(2, 3, 2, 2), leaf(2, 3, 2, 2)), lambda a, b: PF.identity_add(
        a, b, return_statistics=True
    )[0]


CASES = {
    "batch_norm_relu": batch_norm_relu,
    "prefix": prefix,
    "prefix saving": lambda training: prefix(training, True),
    "unit": unit,
    "unit with projection": lambda training: unit(training, True),
    "unit saving": lambda training: unit(training, True, True),
    "identity_add": identity_add,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_first_and_second_order(name, training):
    inputs, call = CASES[name](training)
    with preact.use_backend("cpp"):
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs, fast_mode=True)


def test_gradient_of_a_gradient_norm_matches_eager():
    """A gradient penalty: the second order reaches the parameters of the layers below too."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 16, 3), preact.PreActBasicBlock(16, 16), preact.BatchNormReLU2d(16)
    ).double()
    x = leaf(3, 2, 6, 6)
    results = []
    for backend in ("reference", "cpp"):
        network.zero_grad()
        with preact.use_backend(backend):
            (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
        results.append([p.grad.clone() for p in network.parameters()])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


class CountConvolutionBackward(TorchDispatchMode):
    """Counts gradients of convolutions computed: [inputs, weights, biases]."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0, 0, 0]
        self.reduces = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.counts = [a + b for a, b in zip(self.counts, args[-1], strict=True)]
        if func is torch.ops.preact.batch_norm_relu_conv2d_backward.default:
            self.counts = [self.counts[0] + 1, self.counts[1] + 1, self.counts[2]]
            self.reduces += 1
        if func is torch.ops.preact.residual_units_backward.default:
            layers = len(args[1])
            self.counts = [self.counts[0] + layers, self.counts[1] + layers, self.counts[2]]
            self.reduces += layers
        if "backward_reduce" in str(func):
            self.reduces += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["library's", "own"]
)
@pytest.mark.parametrize(
    ("frozen", "input_needs", "expected", "reduces"),
    [
        ((), True, [2, 2, 0], 2),
        ((), False, [2, 2, 0], 2),
        (("conv1", "conv2"), True, [2, 0, 0], 2),
        (("bn1",), False, [1, 2, 0], 1),
        (("bn1", "conv1"), False, [1, 1, 0], 1),
        (("bn1", "conv1", "bn2"), False, [0, 1, 0], 0),
        (("bn1", "conv1", "bn2", "conv2"), True, [2, 0, 0], 2),
    ],
)
def test_no_gradient_nobody_asked_for(frozen, input_needs, expected, reduces, layout):
    block = preact.PreActBasicBlock(16, 16)
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=layout).requires_grad_(input_needs)
    loss = block(x).sum()
    with CountConvolutionBackward() as counter:
        loss.backward()
    assert counter.counts == expected
    assert counter.reduces == reduces
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in frozen)
    assert (x.grad is not None) == input_needs


def test_first_layer_needs_no_gradient_of_its_input():
    module = preact.BatchNormReLUConv2d(3, 4, 3)
    module.norm.requires_grad_(False)
    loss = module(torch.randn(2, 3, 6, 6)).sum()
    with CountConvolutionBackward() as counter:
        loss.backward()
    assert counter.counts == [0, 1, 0]


def test_unused_output_of_a_shared_activation():
    first, second = leaf(3, 2, 1, 1), leaf(4, 2, 1, 1)
    x, w, b = leaf(2, 2, 3, 3), leaf(2), leaf(2)
    outputs, _ = PF.batch_norm_relu_convs2d(x, norm(w, b, True), [PF.Conv(first), PF.Conv(second)])
    outputs[1].sum().backward()
    assert first.grad is None
    assert second.grad is not None
