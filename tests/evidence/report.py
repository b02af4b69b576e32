"""What limits each convolution's main loop, by architecture, from the table of the binaries.

python -m tests.evidence.report > benchmarks/LIMITS.md
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from .binaries import ARCHITECTURES
from .limits import floor, limits

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "binaries.csv"
_HEAD = """# What limits the Triton convolutions

Counted from machine code, nothing measured: `tests/evidence/limits.py` says how, and from which
documents the rates are. Clocks of a multiprocessor for one step of the main loop of what runs where
nothing is measured; `issue` in bold where it takes longer than multiplying and than the bytes of
maps and weights, and `floor` is the least that issuing could take. Backward to the input has a
pending gradient: with `+forms` each step forms what it takes of it; else it is formed once, stored
and loaded from there, one pass more if loads from a cache count (`python -m benchmarks traffic`).
Each step forms it where the layer's maps take longer than issuing that.
"""
_LIMITS = ("matrix", "memory", "shared", "issue")
_COLUMNS = (
    "| kernel | layer | type | tile, warps | matrix | issue | shared | memory | floor | limit |"
)


def rows() -> list[dict[str, str]]:
    """Of the table, those of loops that multiply on matrix units."""
    with TABLE.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row["limit"]]


def name_of(row: dict[str, str]) -> str:
    kernel = row["kernel"].removeprefix("batch_norm_relu_conv2d").removeprefix("_backward")
    parts = {"": "forward", "_rows": "forward_rows"}
    forms = "+forms" if row["at_steps"] else ""
    return f"sm_{row['arch']} {parts.get(kernel, kernel[1:])}{forms} {row['maps']} {row['dtype']}"


def issue_limited() -> dict[str, tuple[float, float, float]]:
    """Of what runs unmeasured, what issues longer than it multiplies or waits for memory: by how
    many times, by how many at least, and how many times as long shared memory takes."""
    found = {}
    for row in rows():
        of = limits(row)
        if row["default"] and of.issued > 1:
            each = of.issued / of.issue
            found[name_of(row)] = (of.issued, floor(row) * each, of.shared * each)
    return found


def summary() -> Iterator[str]:
    """How many loops each limit has, and those that issue for longer than they should."""
    yield "\n| launched unmeasured | " + " | ".join(_LIMITS) + " |\n" + "|---" * 5 + "|"
    for arch in ARCHITECTURES:
        found = [limits(r).by for r in rows() if int(r["arch"]) == arch and r["default"]]
        counts = " | ".join(str(found.count(limit)) for limit in _LIMITS)
        yield f"| sm_{arch} | {counts} |"
    yield (
        "\nLoops that issue longer than they multiply or wait for memory, by how many times; where"
        " shared\nmemory takes longer still, it is in the way first:\n"
    )
    yield "| loop | issue | shared |\n|---|---|---|"
    for name, (issued, _, shared) in issue_limited().items():
        yield f"| {name} | {issued:.2f} | {shared:.2f} |"


def lines() -> Iterator[str]:
    yield _HEAD.rstrip()
    yield from summary()
    for arch in ARCHITECTURES:
        yield f"\n## sm_{arch}\n"
        yield _COLUMNS
        yield "|" + "---|" * (_COLUMNS.count("|") - 1)
        for row in rows():
            if int(row["arch"]) != arch or not row["default"]:
                continue
            of = limits(row)
            name = name_of(row).split()[1]
            issue = f"{of.issue:.0f}"
            if of.issued > 1:
                issue = f"**{issue}**"
            yield (
                f"| {name} | {row['maps']} | {row['dtype']} | {row['block']}, {row['warps']} |"
                f" {of.matrix:.0f} | {issue} | {of.shared:.0f} | {of.memory:.0f} |"
                f" {floor(row):.0f} | {of.by} |"
            )


if __name__ == "__main__":
    print("\n".join(lines()))
