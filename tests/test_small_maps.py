"""Small maps between the library's convolutions: eager PyTorch is the faster, and runs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import preact
from preact import backends, serving

pytestmark = pytest.mark.skipif(
    backends.available()["cpp"] != "", reason=f"no native kernels: {backends.available()['cpp']}"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The default limit, of which other tests have none; maps here have some thousand elements."""
    monkeypatch.delenv("PREACT_SMALL_MAP")


def test_a_module_by_itself():
    module = preact.BatchNormReLUConv2d(32, 16, 3, groups=2).eval()
    x = torch.randn(2, 32, 8, 8)
    before = serving.small.count
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.conv(module.norm(x).relu()), rtol=0, atol=0)
        assert serving.small.count == before + 1
        with preact.use_backend("cpp"):
            module(x)
    assert serving.small.count == before + 1


def test_a_unit_runs_as_its_prefixes():
    """In float64, for which there is no convolution of ours."""
    unit = preact.PreActBasicBlock(8, 8).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(unit)
    before = serving.small.count
    with preact.use_backend("reference"):
        wanted = expected(x)
        expected(x)
    assert serving.small.count == before, "asked for, and not because they are small"
    torch.testing.assert_close(unit(x), wanted, rtol=0, atol=0)
    assert serving.small.count == before + 2
    with preact.use_backend("cpp"):
        torch.testing.assert_close(unit(x), wanted)
    assert serving.small.count == before + 2
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(unit.get_buffer(name), buffer, rtol=1e-5, atol=1e-7, msg=name)


def test_a_unit_is_as_large_as_its_largest_map():
    small, large = preact.PreActBottleneck(8, 2).double(), preact.PreActBottleneck(8, 2).double()
    large.conv1 = nn.Conv2d(8, 2048, 1).double()
    large.bn2, large.conv2 = nn.BatchNorm2d(2048).double(), nn.Conv2d(2048, 2, 1).double()
    before = serving.small.count
    with torch.no_grad():
        small(torch.randn(2, 8, 8, 8).double())
        assert serving.small.count == before + 3
        large(torch.randn(2, 8, 8, 8).double())
    assert serving.small.count == before + 3


def test_a_trace_is_fused():
    module = preact.BatchNormReLUConv2d(32, 16, 3, groups=2).eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.randn(2, 32, 8, 8), check_trace=False)
    assert "preact::batch_norm_relu" in str(traced.inlined_graph)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_with_projections_and_identities_under_autocast(training, dtype):
    """A stage hands statistics on, and small units have none."""
    torch.manual_seed(1)
    stage = [preact.PreActBottleneck(8, 2, 2), preact.PreActBottleneck(8, 2)]
    for unit in stage:
        unit.conv2 = nn.Conv2d(2, 2, 3, unit.conv2.stride, 1, groups=2, bias=False)
        unit.conv1, unit.conv3 = nn.Conv2d(8, 2, 1, groups=2), nn.Conv2d(2, 8, 1, groups=2)
        unit.shortcut = unit.shortcut and nn.Conv2d(8, 8, 1, 2, groups=2)
    model = nn.Sequential(*stage).train(training)
    eager = copy.deepcopy(model)
    before = serving.small.count
    for _ in range(2):
        x = torch.randn(2, 8, 8, 8, requires_grad=True)
        results = []
        for network, context in ((model, nullcontext()), (eager, preact.use_backend("reference"))):
            with context, torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
                output = network(x)
            results.append((output, *torch.autograd.grad(output.sum(), (x, *network.parameters()))))
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert serving.small.count == before + 12
