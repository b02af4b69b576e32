"""Fused blocks of small maps: their own forward runs where every prefix would be eager PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import preact
from preact import backends
from preact._shadow import KEY

pytestmark = pytest.mark.skipif(
    backends.available()["cpp"] != "", reason=f"no native kernels: {backends.available()['cpp']}"
)


class Bottleneck(nn.Module):
    """Two prefixes, whose 3x3 convolutions have ``groups`` that no kernel of ours takes."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 16, 1, groups=groups, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.conv3(y)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The default limit, of which other tests have none; maps here have some thousand elements."""
    monkeypatch.delenv("PREACT_SMALL_MAP")


@pytest.fixture
def originals(monkeypatch):
    """Calls of the block's own forward."""
    ran = []
    forward = Bottleneck.forward

    def counted(self, x):
        if type(x) is torch.Tensor:  # and no stand-in of a trace
            ran.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(Bottleneck, "forward", counted)
    return ran


def fused(groups=2, training=False):
    block = Bottleneck(groups).to(memory_format=torch.channels_last).train(training)
    eager = copy.deepcopy(block)
    report = preact.fuse_(block)
    assert report.counts["batch_norm_relu_conv2d"] == 2
    return block, eager, report


def maps(batch=2, size=8):
    return torch.randn(batch, 16, size, size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [False, True])
def test_every_bit_is_eager_from_the_first_call_on(training, originals):
    block, eager, _ = fused(training=training)
    originals.clear()
    for call in range(3):
        x = maps().requires_grad_()
        with torch.set_grad_enabled(training):
            output, expected = block(x), eager(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        assert len(originals) == 2 * call + 1, "the plan once, its own forward ever after"
        if training:
            parameters = list(block.parameters()), list(eager.parameters())
            found = torch.autograd.grad(output.square().sum(), (x, *parameters[0]))
            wanted = torch.autograd.grad(expected.square().sum(), (x, *parameters[1]))
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), buffer, rtol=0, atol=0)


def test_another_call_is_decided_by_itself(originals):
    block, _, _ = fused()
    originals.clear()
    large = maps(2, 64)  # 32 channels of these are more than the limit
    with torch.no_grad():
        block(maps())
        block(maps())
        assert len(originals) == 1
        for _ in range(2):
            block(large)
        assert len(originals) == 1
        block(maps())
    assert len(originals) == 2
    block(maps())  # with a graph
    assert len(originals) == 2


@pytest.mark.skipif(backends.cpu_capability() == "baseline", reason="no convolution of ours")
def test_our_own_convolutions_run_however_small(originals):
    block, eager, _ = fused(groups=1)
    originals.clear()
    x = maps(8, 16)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(block(x), eager(x), rtol=1e-4, atol=1e-5)
    assert len(originals) == 2, "eager's own calls alone"


@pytest.mark.parametrize(
    "asked", [lambda: preact.use_backend("cpp"), lambda: preact.use_plan("B")], ids=["cpp", "B"]
)
def test_what_is_asked_for_runs(asked, originals):
    block, _, _ = fused()
    originals.clear()
    with torch.no_grad():
        for _ in range(2):
            block(maps())
        before = len(originals)
        with asked():
            for _ in range(2):
                block(maps())
        assert len(originals) == before
        block(maps())
    assert len(originals) == before + 1


def test_variables_are_asked_again(originals, monkeypatch):
    block, _, _ = fused()
    with torch.no_grad():
        block(maps())
        originals.clear()
        monkeypatch.setenv("PREACT_BACKEND", "cpp")
        for _ in range(2):
            block(maps())
    assert not originals


@pytest.mark.skipif(backends.cpu_capability() == "baseline", reason="no convolution of ours")
def test_a_replaced_convolution_is_noticed(originals):
    block, eager, _ = fused()
    x = maps(8, 16)
    with torch.no_grad():
        block(x)
        block(x)
        for module in (block, eager):
            torch.manual_seed(1)
            module.conv2, module.conv3 = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
            module.to(memory_format=torch.channels_last)
        originals.clear()
        for _ in range(2):
            torch.testing.assert_close(block(x), eager(x), rtol=1e-4, atol=1e-5)
    assert len(originals) == 2, "eager's own calls alone"


def test_the_limit_is_a_variable(originals, monkeypatch):
    block, _, _ = fused()
    originals.clear()
    with torch.no_grad():
        for limit, ran in (("4095", 0), ("4096", 1), ("0", 1), ("", 2)):  # 2 * 32 * 8 * 8 elements
            monkeypatch.setenv("PREACT_SMALL_MAP", limit)
            for _ in range(2):
                block(maps())
            assert len(originals) == ran, limit
        monkeypatch.setenv("PREACT_SMALL_MAP", "few")
        with pytest.raises(ValueError, match="PREACT_SMALL_MAP"):
            block(maps())


def test_the_report_says_so():
    *_, report = fused()
    assert "up to 250000 elements" in report.plan


def test_compiled_code_is_fused_and_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    block, eager, _ = fused()
    x = maps()
    with torch.no_grad():
        block(x)
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
        block(maps(3))  # another call of the block that runs as eager PyTorch
        compiled(x)
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("preact.batch_norm_relu") == 2


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)

    def forward(self, x):
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


def test_a_block_that_is_a_unit(monkeypatch):
    ran = []
    forward = PreActivation.forward
    monkeypatch.setattr(PreActivation, "forward", lambda self, x: ran.append(x) or forward(self, x))
    block = PreActivation().eval()
    eager = copy.deepcopy(block)
    assert preact.fuse_(block).counts["residual_unit"] == 2
    ran.clear()
    with torch.no_grad():
        for call in range(3):
            x = maps()
            torch.testing.assert_close(block(x), eager(x), rtol=0, atol=0)
            assert len(ran) == 2 * call + 1


class Branches(nn.Module):
    """Convolutions that run in another order than they follow the norm in."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.conv1, self.conv2, self.after = (
            nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False) for _ in range(3)
        )

    def forward(self, x):
        y = torch.relu(self.bn(x))
        return self.after(self.conv1(y)) + self.conv2(y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_find_what_they_saved(reentrant):
    """They count the tensors that the first run and the second save."""
    block = Branches()
    eager = copy.deepcopy(block)
    preact.fuse_(block)

    for step in range(4):
        x = torch.randn(2, 8, 6, 6, requires_grad=True)
        for module in (block, eager):
            module.zero_grad()
            checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        found, wanted = ([p.grad for p in module.parameters()] for module in (block, eager))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        if step == 1:  # its own forward from now on, but for checkpoints
            block(x), block(x)


def test_a_batch_of_any_size_is_exported():
    block, eager, _ = fused()
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(block, (maps(),), dynamic_shapes=({0: batch},))
    for count in (3, 40):
        x = maps(count, 8)
        torch.testing.assert_close(program.module()(x), eager(x), rtol=1e-4, atol=1e-5)


def test_blocks_within_count_for_themselves():
    """The outer one's second map is large, and another small one is the inner one's."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, groups=2)
            self.inner = nn.Sequential(
                nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=2)
            )
            self.widen = nn.Conv2d(16, 4096, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(4096), nn.Conv2d(4096, 2, 1, groups=2)

        def forward(self, x):
            y = self.inner(self.conv(torch.relu(self.bn(x))))
            return self.conv2(torch.relu(self.bn2(self.widen(y))))

    ran = []
    outer = Outer().eval()
    eager = copy.deepcopy(outer)
    preact.fuse_(outer)
    forward = Outer.forward
    Outer.forward = lambda self, x: ran.append(x) or forward(self, x)
    with torch.no_grad():
        outer(maps())  # traced anew
    ran.clear()
    with torch.no_grad():
        for _ in range(3):
            x = maps()
            torch.testing.assert_close(outer(x), forward(eager, x), rtol=1e-4, atol=1e-5)
    assert not ran


@pytest.mark.skipif(backends.cpu_capability() == "baseline", reason="no convolution of ours")
def test_training_is_another_call(originals):
    """In training ours takes pointwise convolutions that widen a map, in evaluation none."""
    block = Bottleneck(1)
    block.conv2 = nn.Conv2d(32, 512, 1, bias=False)
    block.bn2, block.conv3 = nn.BatchNorm2d(512), nn.Conv2d(512, 16, 1, groups=2, bias=False)
    block.to(memory_format=torch.channels_last).eval()
    preact.fuse_(block)
    x = maps(2, 12)
    for training, ran in ((False, 1), (True, 0), (False, 1)):
        block.train(training)
        block(x)
        originals.clear()
        block(x)
        assert len(originals) == ran, training


def test_own_modules_within_leave_the_block_fused(originals):
    """One that runs as eager PyTorch is not taken for the prefix that the block itself fuses."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.bn = nn.Conv2d(16, 4096, 1), nn.BatchNorm2d(4096)
            self.conv = nn.Conv2d(4096, 16, 1, groups=2)
            self.own = preact.BatchNormReLUConv2d(16, 16, 3, groups=2)

        def forward(self, x):
            return self.own(self.conv(torch.relu(self.bn(self.widen(x)))))

    outer = Outer().eval()
    preact.fuse_(outer)
    with torch.no_grad():
        outer(maps())
    assert not any(plan.eager for plan in outer.__dict__[KEY].plans)
