"""The paper's networks in full pre-activation, for CIFAR and for ImageNet images."""

from .preresnet import (
    PreActStage,
    PreResNet,
    preresnet18,
    preresnet20,
    preresnet32,
    preresnet34,
    preresnet44,
    preresnet50,
    preresnet56,
    preresnet83,
    preresnet101,
    preresnet110,
    preresnet152,
    preresnet164,
    preresnet200,
    preresnet1001,
)

__all__ = [
    "PreActStage",
    "PreResNet",
    "preresnet18",
    "preresnet20",
    "preresnet32",
    "preresnet34",
    "preresnet44",
    "preresnet50",
    "preresnet56",
    "preresnet83",
    "preresnet101",
    "preresnet110",
    "preresnet152",
    "preresnet164",
    "preresnet200",
    "preresnet1001",
]
