"""The paper's networks: parameter counts, and their layout (section 3.2, section 5)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import preact
from preact import models

CIFAR10 = {20: 272_282, 56: 855_578, 110: 1_730_522, 164: 1_703_258, 1001: 10_327_706}
CIFAR100 = {110: 1_736_372, 164: 1_726_388, 1001: 10_350_836}
IMAGENET = {
    18: 11_687_848, 34: 21_796_008, 50: 25_549_480, 101: 44_541_608, 152: 60_185_256,
    200: 64_666_280,
}  # fmt: skip


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "classes", "expected"),
    [(d, 10, n) for d, n in CIFAR10.items()]
    + [(d, 100, n) for d, n in CIFAR100.items()]
    + [(d, 1000, n) for d, n in IMAGENET.items()],
)
def test_parameter_counts(depth, classes, expected):
    with torch.device("meta"):
        model = getattr(models, f"preresnet{depth}")(num_classes=classes)
    assert count(model) == expected


@pytest.mark.parametrize("name", ["preresnet20", "preresnet83"])
def test_depth_is_the_number_of_weighted_layers(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    branch = [
        m for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear)) and not n.endswith("shortcut")
    ]  # fmt: skip
    assert len(branch) == int(name.removeprefix("preresnet"))


def test_forward_shapes_and_stage_sizes():
    model = models.preresnet20(num_classes=7)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out[0].shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_imagenet_network_and_stride_placement():
    for where, first, second in (("3x3", 1, 2), ("1x1", 2, 1)):
        model = models.preresnet50(num_classes=5, stride_on=where)
        unit = model.stages[1][0]
        assert (unit.conv1.stride[0], unit.conv2.stride[0]) == (first, second)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_hooks_on_units_and_their_norms_see_every_call():
    model = models.preresnet20()
    calls = []
    for module in model.modules():
        if isinstance(module, preact.PreActBasicBlock):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 9
