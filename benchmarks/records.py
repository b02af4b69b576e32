"""Plain CSV files of the studies: one mapping a row, columns in the order of the first row."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["read_records", "write_records"]

Value = str | int | float


def write_records(path: Path, records: Sequence[Mapping[str, Value]]) -> None:
    """Write ``records`` to ``path``, floats with nine digits: enough to give a float32 back."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in record.items()}
            )


def read_records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
