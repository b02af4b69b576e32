"""Blocks in which ``fuse_`` must fuse nothing, for its tests.

``LEFT_ALONE`` lists them with words of the reason it must give. All take one ``[N, 8, H, W]``
tensor.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fuse_styles import Basic, C, Style, conv3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class NoReLU(Basic):
    """PyramidNet's first norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(x)) + self.conv2(self.bn2(x))


class NormUsedTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out1, out2 = self.bn1(x), self.bn2(x)
        return self.conv1(F.relu(out1)) + out1 + self.conv2(F.relu(out2)) + out2


class InPlaceResultIgnored(Basic):
    """relu_ changes the norm's result, which is used under its old name."""

    def forward(self, x: Tensor) -> Tensor:
        out1, out2 = self.bn1(x), self.bn2(x)
        F.relu_(out1)
        F.relu(out2, inplace=True)
        return self.conv1(out1) + self.conv2(out2)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(C), conv3()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.relu(self.bn(x)))
        return self.conv(F.relu(self.bn(out)))


class DataDependent(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) if x.mean() > -100 else x


class StoresResult(Basic):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.branch(x)
        return self.last


class AppendsResult(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        self.seen.append(out)
        return out


class CountsCalls(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branch(x) * (2 if self.calls % 2 else 3)


class RandomPath(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) if random.random() < 2 else x


class NumpyPath(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) if np.random.rand() < 2 else x


class RandomTensor(Basic):
    def forward(self, x: Tensor) -> Tensor:
        alpha = torch.rand(1)
        return self.branch(x) * (alpha * 0 + 1)


class NoGrad(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * 2
        return self.branch(x)


class Autocast(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.branch(x)


class AsksGradMode(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * (2 if torch.is_grad_enabled() else 3)


class Checkpointed(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.branch, x, use_reentrant=False)


class HiddenModules(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.bn1, self.conv1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](F.relu(self.layers[0](x)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


class CustomFunction(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(Double.apply(x))


class Settings:
    double = True


class WatchesObject(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * (2 if self.settings.double else 1)


class FrozenBatchNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, -1, 1, 1)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def norm_before_conv(norm: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(norm, act or nn.ReLU(), conv3())


LEFT_ALONE: dict[str, Style] = {
    "no_relu": Style(NoReLU, (), "followed by Conv2d"),
    "leaky": Style(lambda: norm_before_conv(nn.BatchNorm2d(C), nn.LeakyReLU()), (), "LeakyReLU"),
    "prelu": Style(lambda: norm_before_conv(nn.BatchNorm2d(C), nn.PReLU()), (), "PReLU"),
    "silu": Style(lambda: norm_before_conv(nn.BatchNorm2d(C), nn.SiLU()), (), "SiLU"),
    "relu6": Style(lambda: norm_before_conv(nn.BatchNorm2d(C), nn.ReLU6()), (), "ReLU6"),
    "group_norm": Style(lambda: norm_before_conv(nn.GroupNorm(2, C)), (), "GroupNorm"),
    "frozen": Style(lambda: norm_before_conv(FrozenBatchNorm2d()), (), "FrozenBatchNorm2d"),
    "own_norm": Style(lambda: norm_before_conv(OwnNorm(C)), (), "forward of its own"),
    "norm_used_twice": Style(NormUsedTwice, (), "2 uses"),
    "in_place_ignored": Style(InPlaceResultIgnored, (), "2 uses"),
    "called_twice": Style(CalledTwice, (), "called 2 times"),
    "data_dependent": Style(DataDependent, (), "control flow"),
    "stores_result": Style(StoresResult, (), "writes 'last'"),
    "appends_result": Style(AppendsResult, (), "writes 'seen'"),
    "counts_calls": Style(CountsCalls, (), "writes 'calls'"),
    "random_path": Style(RandomPath, (), "random numbers"),
    "numpy_path": Style(NumpyPath, (), "random numbers"),
    "random_tensor": Style(RandomTensor, (), "torch.rand"),
    "no_grad": Style(NoGrad, (), "switches"),
    "autocast": Style(Autocast, (), "switches"),
    "asks_grad_mode": Style(AsksGradMode, (), "gradients or autocast are on"),
    "checkpointed": Style(Checkpointed, (), "checkpoints"),
    "hidden_modules": Style(HiddenModules, (), "cannot be watched"),
    "custom_function": Style(CustomFunction, (), "autograd Function"),
    "watches_object": Style(WatchesObject, (), "cannot be watched"),
}
