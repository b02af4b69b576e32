"""A small pre-activation network with the layer names of the widespread CIFAR implementation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PreActUnit(nn.Module):
    """The projection, ``shortcut.0``, reads the activated signal; there is no batch norm on it."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activation = torch.relu(self.bn1(x))
        carried = self.shortcut(activation) if len(self.shortcut) else x
        return self.conv2(torch.relu(self.bn2(self.conv1(activation)))) + carried


class PreActNet(nn.Module):
    """Neither an activation before the first split nor one after the last unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PreActUnit(8, 8, 1))
        self.layer2 = nn.Sequential(PreActUnit(8, 16, 2), PreActUnit(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.linear(x.mean((2, 3)))
