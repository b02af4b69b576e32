"""Modules forward and backward on the Triton backend against eager PyTorch, compiled or not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import preact

from ..tolerances import assert_as_good_as_eager, magnitude

MODULES = {
    "norm": lambda: preact.BatchNormReLU2d(8),
    "prefix": lambda: preact.BatchNormReLUConv2d(8, 6, 3, padding=1, bias=True),
    "strided": lambda: preact.BatchNormReLUConv2d(8, 6, 3, stride=2, padding=2, dilation=2),
    "grouped": lambda: preact.BatchNormReLUConv2d(8, 4, 3, padding=1, groups=2),
    "basic": lambda: preact.PreActBasicBlock(8, 8),
    "bottleneck": lambda: preact.PreActBottleneck(8, 4, 2),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def prepared(name: str, training: bool, decided: bool = False) -> nn.Module:
    """With biases well above zero, so that a padding that is not zero shows.

    Where ``decided``, a channel is far above zero or far below: in half precision a rounding that
    moves one value across zero would cost a gradient more than all others together.
    """
    module = MODULES[name]().train(training)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(vector, 0.5, 1.5)
            if decided:
                nn.init.uniform_(norm.weight, 0.2, 0.4)
                nn.init.uniform_(norm.bias, 1.5, 2.0)
                norm.bias.data[::4] *= -1
    return module


def step(module: nn.Module, x: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor | None]:
    """Result, gradients of input and parameters, and the running statistics afterwards."""
    module = copy.deepcopy(module).to(x.device, dtype)
    x = x.detach().to(dtype).requires_grad_()
    with preact.use_backend(backend):
        output = module(x)
        grad = torch.linspace(-1, 1, output.numel()).sin().view_as(output)
        output.backward(grad.to(output))
    floating = [b for b in module.buffers() if b.is_floating_point()]
    return [output, x.grad, *(p.grad for p in module.parameters()), *floating]


@pytest.mark.parametrize(
    ("name", "layout", "training", "dtype"),
    [
        *itertools.product(MODULES, LAYOUTS, [True], [torch.float32]),
        *itertools.product(["prefix", "basic"], ["channels_last"], [False], [torch.float32]),
        *itertools.product(["prefix", "basic"], LAYOUTS, [True], [torch.bfloat16]),
    ],
    ids=str,
)
def test_equals_eager(name, layout, training, dtype, device):
    module = prepared(name, training, decided=dtype == torch.bfloat16).to(dtype)
    x = torch.randn(3, 8, 7, 6).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    fused, eager = (step(module, x, backend, dtype) for backend in ("triton", "reference"))
    exact = step(module, x, "reference", torch.float64)
    terms = max(magnitude(result) for result in exact[1:2])
    for index, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        assert_as_good_as_eager(f"result {index}", a, b, c, terms)


def test_statistics_are_handed_on(device):
    first, second = (preact.PreActBasicBlock(8, 8).to(device) for _ in range(2))
    x = torch.randn(3, 8, 6, 6).to(device)
    with preact.use_backend("triton"):
        output, statistics = first(x, return_statistics=True)
        taken = torch.ops.preact_triton.batch_norm_stats(output.detach())
        for handed_on, own in zip(statistics, taken, strict=True):
            torch.testing.assert_close(handed_on, own, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second(output, statistics), second(output))


@pytest.mark.parametrize("name", ["prefix", "basic"])
def test_compiled_equals_uncompiled(name, device):
    """The kernels stay opaque: one graph, and the launchers run as they are."""
    torch._dynamo.reset()
    module = prepared(name, training=True).to(device)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS.values():
        x = torch.randn(3, 8, 6, 6).to(device).contiguous(memory_format=layout)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with preact.use_backend("triton"):
            outputs = [module(leaves[0]), compiled(leaves[1])]
            grad = torch.randn_like(outputs[0])
            for output in outputs:
                output.backward(grad)
        assert outputs[0].stride() == outputs[1].stride()
        pairs = [outputs, [leaf.grad for leaf in leaves]]
        for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
            pairs.append([mine.grad, theirs.grad])
        pairs += zip(module.buffers(), twin.buffers(), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(theirs, mine)
