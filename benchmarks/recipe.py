"""What defines a training run: the paper's recipe (section 5), and everything that may differ."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from preact import models
from preact.models import PreResNet, shortcuts
from preact.models.shortcuts import Shortcut

__all__ = ["TYPES", "Recipe", "mixed", "shortcut_of"]

TYPES = ("float32", "bfloat16", "float64")
_WARM_UP = 400 / 64_000
_DROPS = (32 / 64, 48 / 64)


def shortcut_of(text: str) -> Shortcut:
    """``"exclusive_gating(-6)"``, as ``str`` of a ``Shortcut`` writes it; ``ValueError`` if not."""
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
    if found is None or found[1] not in shortcuts.SHORTCUTS:
        raise ValueError(f"shortcut {text!r}: known are {', '.join(shortcuts.SHORTCUTS)}")
    arguments = [float(value) for value in found[2].split(",")] if found[2] else []
    try:
        return shortcuts.SHORTCUTS[found[1]](*arguments)
    except TypeError as error:
        raise ValueError(f"shortcut {text!r}: too many numbers") from error


def mixed(*numbers: int) -> int:
    """One seed of several numbers, so that every purpose and step has a stream of its own."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Recipe:
    """One run, whole: two runs of equal recipes on one machine give the same bits.

    Attributes:
        network: a function of ``preact.models``.
        shortcut: as ``shortcut_of`` reads it.
        batch_size: of all processes together, before ``accumulate`` splits it.
        iterations: updates; the learning rate's steps keep their places in relation to it.
        learning_rate: the full one: a tenth of it while warming up, a tenth from 32,000 of 64,000
            iterations and a hundredth from 48,000 on.
        warm_up: iterations at a tenth of the rate; None for 400 of 64,000, in relation as well.
            A short run needs more: in proportion it would warm up for two or three.
        dtype: "bfloat16" is autocast over float32 parameters.
        accumulate: parts of a batch that go through the network one after another, each with
            statistics of its own.
        eager: eager PyTorch instead of the fused kernels.
        evaluate_every: iterations between two looks at the test images; the last one is always.
        log_every: iterations that a line of the training log takes the mean of.
    """

    data: str
    network: str = "preresnet110"
    unit: str = "full_preactivation"
    shortcut: str = "identity"
    option: str = "A"
    seed: int = 0
    batch_size: int = 128
    iterations: int = 64_000
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: int | None = None
    dtype: str = "float32"
    accumulate: int = 1
    augmented: bool = True
    eager: bool = False
    evaluate_every: int = 1_000
    log_every: int = 100

    def rate(self, iteration: int) -> float:
        """The learning rate of one iteration."""
        done = iteration / self.iterations
        warming = done < _WARM_UP if self.warm_up is None else iteration < self.warm_up
        if warming or _DROPS[0] <= done < _DROPS[1]:
            return self.learning_rate / 10
        return self.learning_rate / 100 if done >= _DROPS[1] else self.learning_rate

    @property
    def schedule(self) -> str:
        """How long and at which rates, in words."""
        full, count = self.learning_rate, self.iterations
        warm = sum(self.rate(i) < full for i in range(count // 2))
        drops = " and ".join(f"{math.ceil(place * count):,}" for place in _DROPS)
        return (
            f"{count:,} iterations of {self.batch_size} images: rate {full / 10:g} for the first"
            f" {warm:,}, {full:g}, divided by 10 at {drops}"
        )

    def build(self, classes: int) -> PreResNet:
        """The network; its weights depend on ``seed`` alone of what is random."""
        model: PreResNet = getattr(models, self.network)(
            num_classes=classes, unit=self.unit, shortcut=shortcut_of(self.shortcut),
            option=self.option,
        )  # fmt: skip
        return model

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The fields in which a stored recipe differs."""
        own = dataclasses.asdict(self)
        return sorted(name for name in own if own[name] != other.get(name))
