"""Pre-activation residual networks (He et al. 2016): stem, stages of units, a last BN-ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Statistics
from ..modules import BatchNormReLU2d, PreActBasicBlock, PreActBottleneck

Unit = type[PreActBasicBlock] | type[PreActBottleneck]


class PreActStage(nn.Sequential):
    """Units in sequence, each handing the statistics of its result on to the next."""

    def forward(
        self, input: Tensor, statistics: Statistics | None = None
    ) -> tuple[Tensor, Statistics | None]:
        for unit in self:
            input, statistics = unit(input, statistics, return_statistics=True)
        return input, statistics


class PreResNet(nn.Module):
    """``stem -> stages -> BN-ReLU -> mean over H and W -> fc``: ``[N, 3, H, W]`` to ``[N, K]``.

    ``units`` and ``widths`` give each stage's number of units and their ``channels``; every stage
    but the first halves the image. ``stem`` is the module before the first unit, which itself
    begins with BN-ReLU, before its branch and shortcut part (section 3.2 of the paper).
    """

    def __init__(
        self,
        unit: Unit,
        units: Sequence[int],
        widths: Sequence[int],
        stem: nn.Module,
        stem_channels: int,
        num_classes: int,
        **unit_arguments: Any,
    ) -> None:
        super().__init__()
        self.stem = stem
        channels = stem_channels
        stages = []
        for index, (count, width) in enumerate(zip(units, widths, strict=True)):
            blocks = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(unit(channels, width, stride, **unit_arguments))
                channels = width * unit.expansion
            stages.append(PreActStage(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = BatchNormReLU2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        x = self.stem(input)
        statistics: Statistics | None = None
        for stage in self.stages:
            x, statistics = stage(x, statistics)
        x = self.norm(x, statistics)
        logits: Tensor = self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _cifar(unit: Unit, depth: int) -> Callable[..., PreResNet]:
    """32x32 images: widths 16, 32, 64; n = (depth - 2) / 6 units a stage, / 9 for bottlenecks."""
    per_unit = 9 if unit is PreActBottleneck else 6
    count = (depth - 2) // per_unit

    def build(num_classes: int = 10, **unit_arguments: Any) -> PreResNet:
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        return PreResNet(unit, [count] * 3, [16, 32, 64], stem, 16, num_classes, **unit_arguments)

    kind = "bottleneck" if unit is PreActBottleneck else "basic"
    build.__name__ = build.__qualname__ = f"preresnet{depth}"
    build.__doc__ = (
        f"Pre-activation ResNet-{depth} for CIFAR, {kind} units, {count} a stage. Keyword arguments"
        " go to every unit."
    )
    return build


def _imagenet(unit: Unit, depth: int, units: Sequence[int]) -> Callable[..., PreResNet]:
    """224x224 images: 7x7 stem with stride 2 and a 3x3 maximum pool before the first unit."""

    def build(num_classes: int = 1000, **unit_arguments: Any) -> PreResNet:
        stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            BatchNormReLU2d(64),
            nn.MaxPool2d(3, 2, 1),
        )
        return PreResNet(unit, units, [64, 128, 256, 512], stem, 64, num_classes, **unit_arguments)

    build.__name__ = build.__qualname__ = f"preresnet{depth}"
    build.__doc__ = (
        f"Pre-activation ResNet-{depth} for ImageNet, units {list(units)}. Keyword arguments go to"
        " every unit."
    )
    return build


preresnet20 = _cifar(PreActBasicBlock, 20)
preresnet32 = _cifar(PreActBasicBlock, 32)
preresnet44 = _cifar(PreActBasicBlock, 44)
preresnet56 = _cifar(PreActBasicBlock, 56)
preresnet110 = _cifar(PreActBasicBlock, 110)
preresnet83 = _cifar(PreActBottleneck, 83)
preresnet164 = _cifar(PreActBottleneck, 164)
preresnet1001 = _cifar(PreActBottleneck, 1001)

preresnet18 = _imagenet(PreActBasicBlock, 18, [2, 2, 2, 2])
preresnet34 = _imagenet(PreActBasicBlock, 34, [3, 4, 6, 3])
preresnet50 = _imagenet(PreActBottleneck, 50, [3, 4, 6, 3])
preresnet101 = _imagenet(PreActBottleneck, 101, [3, 4, 23, 3])
preresnet152 = _imagenet(PreActBottleneck, 152, [3, 8, 36, 3])
preresnet200 = _imagenet(PreActBottleneck, 200, [3, 24, 36, 3])
