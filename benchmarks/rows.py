"""One row of the CSV: a provider in one layout, for one network, type and mode."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .timing import Spread

__all__ = ["FLOOR", "Row", "columns", "read_csv", "write_csv"]

FLOOR = "conv floor"


@dataclass
class Row:
    """Figures of one lane; None stands for a figure that does not apply or was not taken.

    Attributes:
        parity: "reference" for the baseline, "passed", "FAILED", "error", or "" for the floor.
        margin: largest error over its allowance, see ``parity.Parity``.
        note: what failed, or what the provider did.
        step: 20th, 50th and 80th percentile of the time of a step, in seconds.
        speedup: time of the best eager layout over this lane's, paired by round.
        against_compile: time of the best compiled layout over this lane's, likewise.
        over_floor: this lane's time over the conv floor's, likewise.
        best: the fastest layout of its provider.
    """

    network: str
    source: str
    batch_size: int
    image_size: int
    dtype: str
    mode: str
    provider: str
    layout: str
    parity: str = ""
    margin: float | None = None
    note: str = ""
    best: bool = False
    rounds: int | None = None
    step: Spread | None = None
    speedup: Spread | None = None
    against_compile: Spread | None = None
    over_floor: Spread | None = None
    faults: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    compile_seconds: float | None = None


_SPREADS = {
    "step": ("step_p20_ms", "step_p50_ms", "step_p80_ms"),
    "speedup": ("speedup_q25", "speedup", "speedup_q75"),
    "against_compile": ("against_compile_q25", "against_compile", "against_compile_q75"),
    "over_floor": ("over_floor_q25", "over_floor", "over_floor_q75"),
}


def _number(value: float) -> str:
    return f"{value:.6g}"


def _cells(row: Row) -> dict[str, str]:
    cells: dict[str, str] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in _SPREADS:
            scale = 1e3 if field.name == "step" else 1.0
            parts: tuple[str, ...] = ("", "", "")
            if value is not None:
                parts = tuple(_number(v * scale) for v in (value.low, value.median, value.high))
            cells.update(zip(_SPREADS[field.name], parts, strict=True))
        elif value is None:
            cells[field.name] = ""
        elif isinstance(value, float):
            cells[field.name] = _number(value)
        else:
            cells[field.name] = str(value)
    return cells


def columns(conditions: Mapping[str, str]) -> list[str]:
    """Names of the CSV's columns: the row's own, then the conditions of the run."""
    return [*_cells(Row("", "", 0, 0, "", "", "", "")), *conditions]


def write_csv(path: Path, rows: Sequence[Row], conditions: Mapping[str, str]) -> None:
    """Write all rows; ``conditions`` (versions, hardware, date) are repeated on each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(conditions), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**_cells(row), **conditions} for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a file written by ``write_csv``, one mapping a row."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
