"""Residual networks of the paper's units: stem, stages, last activation, classifier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import batch_norm, fused_batch_norm_relu, fused_units
from ..folded import ALWAYS, folded_conv2d
from ..folded_units import folded_units
from ..functional import Statistics
from ..hooks import is_called_plainly
from .units import LAYERS, ResidualUnit, arrangement, out_channels

IMAGENET = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
    200: ("bottleneck", [3, 24, 36, 3]),
}


class PreActStage(nn.Sequential):
    """Units in sequence, each handing the statistics of its result on to the next."""

    def forward(
        self, input: Tensor, statistics: Statistics | None = None
    ) -> tuple[Tensor, Statistics | None]:
        for together, run in itertools.groupby(self, key=_joins_its_like):
            units = list(run)
            if together:
                layers = [unit.layers() for unit in units if isinstance(unit, ResidualUnit)]
                together_as = folded_units if all(unit.folds for unit in units) else fused_units
                input, statistics = together_as(input, layers, statistics, units[-1].training)
                continue
            for unit in units:
                input, statistics = unit(input, statistics, return_statistics=True)
        return input, statistics


def _joins_its_like(unit: nn.Module) -> bool:
    return type(unit) is ResidualUnit and unit.joins_its_like()


class PreResNet(nn.Module):
    """``[N, 3, H, W]`` to ``[N, num_classes]``: any depth, unit and shortcut of the paper.

    Around the units stands what their order of activation needs (section 3.2 and the appendix):

    - full pre-activation: the first unit's BN-ReLU comes before its split, and one BN-ReLU more
      after the last addition;
    - ReLU-only pre-activation: a BN behind the stem, the first ReLU before the split, and one ReLU
      more after the last addition;
    - the others: BN-ReLU behind the stem, nothing after the last unit.

    Args:
        layers: "basic", "bottleneck" or "one_layer" units.
        units: number of units of each stage; every stage but the first halves the image.
        widths: ``channels`` of each stage's units.
        num_classes: length of the result.
        stem_channels: channels before the first unit.
        imagenet_stem: a 7x7 convolution with stride 2, BN-ReLU and a 3x3 maximum pool with
            stride 2, in place of a 3x3 convolution.
        stem_norm: whether the ImageNet stem has its BN-ReLU, where the first unit begins with one.
        activate_before_split: as above; False leaves the first unit like the others.
        last_activation: as above; False leaves it out.
        unit: a name in ``UNITS``.
        **unit_arguments: ``shortcut``, ``option``, ``stride_on`` and ``save_activation`` of
            ``ResidualUnit``.
    """

    folds = False
    """Whether ``fold_`` was asked for."""

    def __init__(
        self,
        layers: str,
        units: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        stem_channels: int = 16,
        imagenet_stem: bool = False,
        stem_norm: bool = True,
        activate_before_split: bool = True,
        last_activation: bool = True,
        unit: str = "full_preactivation",
        **unit_arguments: Any,
    ) -> None:
        super().__init__()
        before = arrangement(unit).before
        kernel, stride = (7, 2) if imagenet_stem else (3, 1)
        self.stem = nn.Conv2d(3, stem_channels, kernel, stride, kernel // 2, bias=False)
        self.stem_norm: nn.BatchNorm2d | None = None
        if before != "norm_relu" or (imagenet_stem and stem_norm):
            self.stem_norm = nn.BatchNorm2d(stem_channels)
        # In ReLU-only pre-activation the first unit brings the ReLU; a pool may follow it as well.
        self.stem_relu = before != "relu" or imagenet_stem
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet_stem else None
        channels = stem_channels
        stages = []
        for index, (count, width) in enumerate(zip(units, widths, strict=True)):
            blocks = []
            for position in range(count):
                blocks.append(
                    ResidualUnit(
                        channels,
                        width,
                        2 if index > 0 and position == 0 else 1,
                        layers=layers,
                        unit=unit,
                        activate_before_split=activate_before_split and index + position == 0,
                        **unit_arguments,
                    )
                )
                channels = out_channels(layers, width)
            stages.append(PreActStage(*blocks))
        self.stages = nn.ModuleList(stages)
        self.last_relu = last_activation and before == "relu"
        self.norm: nn.BatchNorm2d | None = None
        if last_activation and before == "norm_relu":
            self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        x, statistics = self.open(input), None
        for stage in self.stages:
            x, statistics = stage(x, statistics)
        return self.close(x, statistics)

    def open(self, input: Tensor) -> Tensor:
        """What comes before the first unit."""
        if self.folds and self.stem_norm is not None and is_called_plainly(self.stem):
            x = folded_conv2d(input, self.stem, self.stem_norm, self.stem_relu)
            return x if self.pool is None else self.pool(x)
        x = self.stem(input)
        if self.stem_norm is not None:
            fused = self.stem_relu
            x = fused_batch_norm_relu(self.stem_norm, x) if fused else batch_norm(self.stem_norm, x)
        return x if self.pool is None else self.pool(x)

    def close(self, input: Tensor, statistics: Statistics | None = None) -> Tensor:
        """What comes after the last unit: its ``[N, C, H, W]`` to the network's result."""
        if self.norm is not None:
            input = fused_batch_norm_relu(self.norm, input, statistics)
        elif self.last_relu:
            input = F.relu(input)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(input, 1), 1))
        return logits

    def folded_norms(self) -> dict[nn.Module, str]:
        """Those that ``fold_`` folds into the convolutions before them, and when."""
        return {} if self.stem_norm is None else {self.stem_norm: ALWAYS}

    def unfused_norms(self) -> dict[nn.Module, str]:
        """The norms outside its units that run in eager PyTorch, each with the reason."""
        if self.stem_norm is None or self.stem_relu:
            return {}
        return {self.stem_norm: "its ReLU is the first unit's, before the split"}


def _cifar(layers: str, depth: int, suffix: str = "") -> Callable[..., PreResNet]:
    """32x32 images: widths 16, 32, 64; depth - 2 layers shared by three stages of units."""
    count, rest = divmod(depth - 2, 3 * len(LAYERS[layers]))
    assert rest == 0, depth

    def build(num_classes: int = 10, **arguments: Any) -> PreResNet:
        return PreResNet(layers, [count] * 3, [16, 32, 64], num_classes, **arguments)

    build.__name__ = build.__qualname__ = f"preresnet{depth}{suffix}"
    build.__doc__ = (
        f"ResNet-{depth} for CIFAR, {layers} units, {count} a stage. Keyword arguments are those of"
        ' ``PreResNet`` and ``ResidualUnit``; the paper\'s basic ResNet-110 has ``option="A"``.'
    )
    return build


def _imagenet(depth: int) -> Callable[..., PreResNet]:
    """224x224 images: 7x7 stem with stride 2 and a 3x3 maximum pool before the first unit."""
    layers, units = IMAGENET[depth]

    def build(num_classes: int = 1000, **arguments: Any) -> PreResNet:
        return PreResNet(
            layers, units, [64, 128, 256, 512], num_classes,
            **{"stem_channels": 64, "imagenet_stem": True, **arguments},
        )  # fmt: skip

    build.__name__ = build.__qualname__ = f"preresnet{depth}"
    build.__doc__ = (
        f"ResNet-{depth} for ImageNet, {layers} units {units}. Keyword arguments are those of"
        " ``PreResNet`` and ``ResidualUnit``."
    )
    return build


def _wide(depth: int, factor: int) -> Callable[..., PreResNet]:
    """Wide networks (Zagoruyko & Komodakis 2016): basic units, ``factor`` times the channels."""
    count, rest = divmod(depth - 4, 6)
    assert rest == 0, depth

    def build(num_classes: int = 10, **arguments: Any) -> PreResNet:
        widths = [width * factor for width in (16, 32, 64)]
        return PreResNet("basic", [count] * 3, widths, num_classes, **arguments)

    build.__name__ = build.__qualname__ = f"wideresnet{depth}_{factor}"
    build.__doc__ = (
        f"WRN-{depth}-{factor} for CIFAR, without dropout, {count} basic units a stage. Keyword"
        " arguments are those of ``PreResNet`` and ``ResidualUnit``."
    )
    return build


preresnet20 = _cifar("basic", 20)
preresnet32 = _cifar("basic", 32)
preresnet44 = _cifar("basic", 44)
preresnet56 = _cifar("basic", 56)
preresnet110 = _cifar("basic", 110)
preresnet110_one_layer = _cifar("one_layer", 110, "_one_layer")
preresnet83 = _cifar("bottleneck", 83)
preresnet164 = _cifar("bottleneck", 164)
preresnet1001 = _cifar("bottleneck", 1001)

preresnet18 = _imagenet(18)
preresnet34 = _imagenet(34)
preresnet50 = _imagenet(50)
preresnet101 = _imagenet(101)
preresnet152 = _imagenet(152)
preresnet200 = _imagenet(200)

wideresnet16_8 = _wide(16, 8)
wideresnet28_10 = _wide(28, 10)
wideresnet40_4 = _wide(40, 4)
