"""What the runs of a study show: the table beside the paper's, the order of rows, the curves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from .data import Data
from .records import Value, read_records
from .studies import FAIL, Row
from .training import TEST_LOG, TRAIN_LOG, Result

__all__ = ["Runs", "draw_curves", "order_told", "remark", "summary", "table_of"]


@dataclass
class Runs:
    """The finished runs of a study, by row and seed; ``schedule`` is that of all."""

    title: str
    rows: Sequence[Row]
    schedule: str = ""
    results: dict[tuple[str, int], Result] = field(default_factory=dict)
    folders: dict[tuple[str, int], Path] = field(default_factory=dict)

    def add(self, row: Row, seed: int, result: Result, folder: Path) -> None:
        self.results[row.key, seed] = result
        self.folders[row.key, seed] = folder

    def of(self, row: Row) -> list[Result]:
        return [result for (key, _), result in self.results.items() if key == row.key]

    def finished(self) -> list[Row]:
        """The rows with a run."""
        return [row for row in self.rows if self.of(row)]

    def error(self, row: Row) -> float:
        """The median over seeds of the last test error in percent."""
        return statistics.median(result.test_error for result in self.of(row))

    def curve(self, row: Row, log: str, column: str) -> list[tuple[int, float]]:
        """The median over the finished seeds, by iteration."""
        values: dict[int, list[float]] = {}
        for (key, _), folder in self.folders.items():
            if key == row.key:
                for record in read_records(folder / log):
                    values.setdefault(int(record["iteration"]), []).append(float(record[column]))
        return [(iteration, statistics.median(found)) for iteration, found in values.items()]

    def curves(self) -> list[dict[str, Value]]:
        """One record for every iteration that any run logged."""
        return [
            {
                "network": row.network, "unit": row.unit, "shortcut": row.shortcut,
                "quantity": column, "iteration": iteration, "median": value,
            }
            for row in self.finished()
            for log, column in ((TRAIN_LOG, "loss"), (TEST_LOG, "test_error"))
            for iteration, value in self.curve(row, log, column)
        ]  # fmt: skip


def _papers(row: Row, data: Data) -> float:
    return row.paper.get(data.name, row.paper["cifar10"])


def _percent(error: float) -> str:
    return "fail" if error > FAIL else f"{error:.2f}"


def remark(data: Data, schedule: str) -> str:
    """Whether the two columns can be compared."""
    trained = (
        f"Here {schedule}. The paper: 64,000 iterations of 128 images, 0.01 for the first 400, 0.1,"
        " divided by 10 at 32,000 and 48,000."
    )
    if data.name.startswith("cifar"):
        return f"Both columns are {data.title}. {trained}"
    return (
        f"The data set is another: ours is {data.title}, the paper's CIFAR-10. Its figures cannot"
        f" be reproduced with it; at most the order of the rows can be compared. {trained}"
    )


def summary(runs: Runs, data: Data) -> list[dict[str, Value]]:
    """A record for each row with a run; the paper's figure as it prints it."""
    records: list[dict[str, Value]] = []
    for row in runs.finished():
        errors = [result.test_error for result in runs.of(row)]
        records.append(
            {
                "network": row.network, "unit": row.unit, "shortcut": row.shortcut,
                "option": row.option, "paper_error": _percent(_papers(row, data)),
                "data": data.name, "seeds": len(errors), "median_error": runs.error(row),
                "lowest_error": min(errors), "highest_error": max(errors),
                "median_train_loss": statistics.median(r.train_loss for r in runs.of(row)),
                "diverged": sum(result.diverged for result in runs.of(row)),
                "remark": remark(data, runs.schedule),
            }
        )  # fmt: skip
    return records


def table_of(runs: Runs, data: Data) -> Table:
    table = Table(
        title=runs.title,
        title_justify="left",
        caption=remark(data, runs.schedule),
        caption_justify="left",
    )
    for heading in ("network", "unit", "shortcut", "paper %", "here %", "lowest-highest", "seeds"):
        table.add_column(heading)
    for row in runs.finished():
        errors = [result.test_error for result in runs.of(row)]
        spread = f"{min(errors):.2f}-{max(errors):.2f}"
        table.add_row(
            row.network, row.unit, row.shortcut, _percent(_papers(row, data)),
            f"{runs.error(row):.2f}" + (" fail" if runs.error(row) > FAIL else ""), spread,
            str(len(errors)),
        )  # fmt: skip
    return table


def order_told(runs: Runs) -> str:
    """How many pairs of rows of one network stand in the paper's order."""
    same = other = equal = 0
    for a, b in itertools.combinations(runs.finished(), 2):
        papers = a.paper["cifar10"], b.paper["cifar10"]
        if a.network != b.network or papers[0] == papers[1]:
            continue
        ours = runs.error(a), runs.error(b)
        if all(error > FAIL for error in ours) or ours[0] == ours[1]:
            equal += 1
        elif (ours[0] < ours[1]) == (papers[0] < papers[1]):
            same += 1
        else:
            other += 1
    return (
        f"Of {same + other + equal} pairs of rows that the paper puts in an order, {same} stand in"
        f" it here, {other} the other way round, {equal} are equal or both failed."
    )


def draw_curves(runs: Runs, data: Data, path: Path) -> None:
    """Training loss and test error by iteration, as in the paper's figures 1, 5 and 6."""
    rows = runs.finished()
    networks = list(dict.fromkeys(row.network for row in rows))
    figure = Figure(figsize=(12, 4.2 * len(networks) + 1.5), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for line, network in zip(panels, networks, strict=True):
        for axes, (log, column, label) in zip(
            line,
            ((TRAIN_LOG, "loss", "training loss"), (TEST_LOG, "test_error", "test error in %")),
            strict=True,
        ):
            for number, row in enumerate(r for r in rows if r.network == network):
                points = [p for p in runs.curve(row, log, column) if math.isfinite(p[1])]
                style = ("-", "--")[number // 10 % 2]
                if points:
                    axes.plot(*zip(*points, strict=True), style, lw=1.2, label=row.title)
            axes.set_title(f"{network}, {label}", fontsize=10)
            axes.set_xlabel("iteration")
        line[0].set_yscale("log")
        line[1].set_ylim(0, 100)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    seeds = max(len(runs.of(row)) for row in rows)
    figure.suptitle(
        f"{runs.title}; {data.title}, medians of up to {seeds} runs", x=0.01, ha="left", fontsize=10
    )
    figure.savefig(path, dpi=150)
