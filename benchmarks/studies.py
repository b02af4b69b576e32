"""The rows of the paper's Tables 1 to 3, each with the figure that stands there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from preact.models import UNITS

__all__ = ["FAIL", "STUDIES", "Row", "Study"]

FAIL = 20.0
"""Test error in percent above which the paper writes "fail"."""


@dataclass(frozen=True)
class Row:
    """One row: what is trained, and the paper's test error of it, by data set.

    ``paper`` holds percent, infinity for "fail".
    """

    title: str
    network: str
    unit: str
    shortcut: str
    paper: dict[str, float]

    @property
    def option(self) -> str:
        """Projections in networks of bottlenecks, else zero-padded shortcuts, as in the paper."""
        return "B" if self.network in ("preresnet83", "preresnet164", "preresnet1001") else "A"

    @property
    def key(self) -> str:
        """Folder of its runs: a name without characters that a file system may refuse."""
        words = f"{self.network} {self.unit} {self.shortcut}"
        cleaned = "".join(c if c.isalnum() or c in "_.-" else " " for c in words)
        return "-".join(cleaned.split())


@dataclass(frozen=True)
class Study:
    """A table of the paper."""

    title: str
    rows: Sequence[Row]

    def in_networks(self, names: Sequence[str]) -> list[Row]:
        """The rows in the networks named; all rows as they are where none is.

        A row that the table does not hold for a network keeps the figure of the first it does.
        """
        if not names:
            return list(self.rows)
        kinds = {(row.unit, row.shortcut): row for row in reversed(self.rows)}
        there = {(row.network, row.unit, row.shortcut): row for row in self.rows}
        return [
            there.get((name, *kind), dataclasses.replace(first, network=name))
            for name in names
            for kind, first in reversed(kinds.items())
        ]


_INFINITE = float("inf")


def _shortcuts() -> Study:
    figures = {
        "identity": 6.61,
        "constant_scaling(0, 1)": _INFINITE,
        "constant_scaling(0.5, 1)": _INFINITE,
        "constant_scaling(0.5, 0.5)": 12.35,
        "exclusive_gating(0)": _INFINITE,
        "exclusive_gating(-5)": _INFINITE,
        "exclusive_gating(-6)": 8.70,
        "exclusive_gating(-7)": 9.81,
        "shortcut_only_gating(0)": 12.86,
        "shortcut_only_gating(-6)": 6.91,
        "convolution": 12.22,
        "dropout(0.5)": _INFINITE,
    }
    rows = [Row(s, "preresnet110", "original", s, {"cifar10": e}) for s, e in figures.items()]
    return Study("Table 1: shortcuts, original units", rows)


def _activations() -> Study:
    figures = {
        "preresnet110": (6.61, 8.17, 7.84, 6.71, 6.37),
        "preresnet164": (5.93, 6.50, 6.14, 5.91, 5.46),
    }
    rows = [
        Row(unit.replace("_", " "), network, unit, "identity", {"cifar10": error})
        for network, errors in figures.items()
        for unit, error in zip(UNITS, errors, strict=True)
    ]
    return Study("Table 2: order of activation", rows)


def _depth() -> Study:
    figures: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        "preresnet110_one_layer": ({"cifar10": 9.90}, {"cifar10": 8.91}),
        "preresnet110": ({"cifar10": 6.61}, {"cifar10": 6.37}),
        "preresnet164": (
            {"cifar10": 5.93, "cifar100": 25.16}, {"cifar10": 5.46, "cifar100": 24.33},
        ),
        "preresnet1001": (
            {"cifar10": 7.61, "cifar100": 27.82}, {"cifar10": 4.92, "cifar100": 22.71},
        ),
    }  # fmt: skip
    rows = [
        Row(unit.replace("_", " "), network, unit, "identity", paper)
        for network, pair in figures.items()
        for unit, paper in zip(("original", "full_preactivation"), pair, strict=True)
    ]
    return Study("Table 3: original and full pre-activation by depth", rows)


STUDIES = {"shortcuts": _shortcuts(), "activations": _activations(), "depth": _depth()}
