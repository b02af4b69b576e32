"""Running statistics where units are not as most are: other extents inside, one unit twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import preact
from preact.models import PreActStage, ResidualUnit


class Widened(nn.Module):
    """An identity unit whose inner map is larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(16, momentum=1.0)
        self.conv1 = nn.Conv2d(16, 16, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16, momentum=1.0)
        self.conv2 = nn.Conv2d(16, 16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


def image(size: int) -> Tensor:
    x = torch.randn(3, 16, size, size).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def assert_same_buffers(fused: nn.Module, eager: nn.Module) -> None:
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_each_norm_counts_the_values_of_its_own_input():
    eager = Widened().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(eager)
    preact.fuse_(fused)
    for _ in range(2):  # what was decided at the first call holds for the second
        x = image(6)
        eager(x), fused(x)
        assert_same_buffers(fused, eager)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_unit_twice_in_a_stage_counts_twice(momentum):
    unit = ResidualUnit(16, 16)
    for norm in (unit.bn1, unit.bn2):
        norm.momentum = momentum
    stage = PreActStage(unit, unit, unit).to(memory_format=torch.channels_last)
    eager = copy.deepcopy(stage)
    for _ in range(2):
        x = image(8)
        stage(x)
        with preact.use_backend("reference"):
            for part in eager:
                x = part(x)
        assert_same_buffers(stage, eager)


def test_a_convolution_that_pads_otherwise_is_refused():
    unit = preact.PreActBasicBlock(16, 16)
    unit.conv2 = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", bias=False)
    before = copy.deepcopy(unit)
    with pytest.raises(ValueError, match="padding_mode"):
        unit(image(8))
    assert_same_buffers(unit, before)


def prefixes() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


def stage() -> nn.Module:
    return PreActStage(*(ResidualUnit(16, 16) for _ in range(3)))


def dense() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.densenet._DenseBlock(3, 16, 4, 8, 0.0)


def value_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y[0] if isinstance(y, tuple) else y).square().sum()


@pytest.mark.parametrize("make", [prefixes, Widened, stage, dense])
def test_training_in_between_leaves_the_gradient_of_evaluation(make) -> None:
    """Backward is of the running statistics that forward took: eager takes those that a forward in
    training has left since."""
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    model(image(8))  # so that the running statistics are no noughts and ones
    preact.fuse_(model)
    x = image(8)
    apart, both = copy.deepcopy(model), copy.deepcopy(model)
    expected = torch.zeros_like(x)
    for training in (False, True):
        (gradient,) = torch.autograd.grad(value_of(apart.train(training), x), x)
        expected += gradient
    evaluated = value_of(both.eval(), x)
    trained = value_of(both.train(), x)
    (found,) = torch.autograd.grad(evaluated + trained, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
