"""The networks that can be measured, with the sizes each one is measured at."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

__all__ = ["NETWORKS", "Network", "available"]


@dataclass(frozen=True)
class Network:
    """One network and its default workload.

    Attributes:
        name: the name used on the command line and in the CSV.
        source: the package that ``build`` imports: ``preact``, ``torchvision`` or ``timm``.
        build: returns a newly initialised model with ``classes`` outputs.
        image_size: side of the square input.
        batch_cpu: images a step on the CPU.
        batch_cuda: images a step on CUDA.
        classes: number of classes.
        default: part of the selection that runs when no network is named.
        quick: part of the one-minute selection of ``--quick``.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    image_size: int
    batch_cpu: int
    batch_cuda: int
    classes: int
    default: bool = False
    quick: bool = False

    @property
    def own(self) -> bool:
        """Whether the model is made of preact's modules, so that nothing has to be swapped."""
        return self.source == "preact"

    def batch_size(self, device_type: str) -> int:
        return self.batch_cuda if device_type == "cuda" else self.batch_cpu


def _own(name: str, classes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = importlib.import_module("preact.models")
        model: nn.Module = getattr(models, name)(num_classes=classes)
        return model

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision = importlib.import_module("torchvision")
        model: nn.Module = torchvision.models.get_model(name, weights=None)
        return model

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = importlib.import_module("timm")
        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return build


def _cifar(name: str, default: bool = False, quick: bool = False) -> Network:
    return Network(name, "preact", _own(name, 10), 32, 64, 128, 10, default, quick)


def _imagenet(
    name: str, source: str, build: Callable[[], nn.Module], default: bool = False
) -> Network:
    return Network(name, source, build, 224, 8, 32, 1000, default)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        _cifar("preresnet20", quick=True),
        _cifar("preresnet56", default=True),
        _cifar("preresnet110"),
        _cifar("preresnet83", default=True),
        _cifar("preresnet164"),
        _imagenet("preresnet50", "preact", _own("preresnet50", 1000)),
        _imagenet("densenet121", "torchvision", _torchvision("densenet121"), default=True),
        _imagenet("resnet50", "torchvision", _torchvision("resnet50")),
        # timm's plain variant: BatchNormAct2d pre-activation and ordinary convolutions.
        _imagenet("resnetv2_50", "timm", _timm("resnetv2_50")),
    )
}


def available(network: Network) -> str:
    """Return "" if the network's package is installed, else the reason why it cannot be built."""
    if importlib.util.find_spec(network.source) is None:
        return f"{network.source} is not installed"
    return ""
