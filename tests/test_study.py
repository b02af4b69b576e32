"""``benchmarks study``: the paper's rows and figures, run by run, stopped and continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import study as study_module
from benchmarks.__main__ import main
from benchmarks.data import DATA, Data
from benchmarks.recipe import Recipe, shortcut_of
from benchmarks.records import read_records
from benchmarks.studies import STUDIES, Row
from benchmarks.study_results import Runs, order_told, remark
from benchmarks.training import Result as RunResult
from preact import models
from preact.models import PreResNet

from .test_train import noise, one_thread  # noqa: F401


def test_the_tables_are_the_papers():
    figures = {name: [row.paper["cifar10"] for row in s.rows] for name, s in STUDIES.items()}
    failed = float("inf")
    assert figures["shortcuts"] == [
        6.61, failed, failed, 12.35, failed, failed, 8.70, 9.81, 12.86, 6.91, 12.22, failed,
    ]  # fmt: skip
    assert figures["activations"] == [
        6.61, 8.17, 7.84, 6.71, 6.37, 5.93, 6.50, 6.14, 5.91, 5.46,
    ]  # fmt: skip
    assert figures["depth"] == [9.90, 8.91, 6.61, 6.37, 5.93, 5.46, 7.61, 4.92]
    hundred = [row.paper.get("cifar100") for row in STUDIES["depth"].rows]
    assert hundred == [None] * 4 + [25.16, 24.33, 27.82, 22.71]


def test_every_row_can_be_built():
    for study in STUDIES.values():
        assert len({row.key for row in study.rows}) == len(study.rows)
        for row in study.rows:
            with torch.device("meta"):
                model = getattr(models, row.network)(
                    unit=row.unit, shortcut=shortcut_of(row.shortcut), option=row.option
                )
            projections = any(
                "shortcut.weight" in k or "shortcut.0" in k for k in model.state_dict()
            )
            assert projections == (row.option == "B" or row.shortcut == "convolution")


def test_other_networks_keep_rows_and_figures():
    rows = STUDIES["activations"].in_networks(["preresnet164", "preresnet20"])
    assert [row.paper["cifar10"] for row in rows[:5]] == [5.93, 6.50, 6.14, 5.91, 5.46]
    assert [row.paper["cifar10"] for row in rows[5:]] == [6.61, 8.17, 7.84, 6.71, 6.37]
    assert [row.option for row in rows] == ["B"] * 5 + ["A"] * 5
    assert STUDIES["depth"].in_networks([]) == list(STUDIES["depth"].rows)


def test_the_order_of_rows_is_counted_within_a_network(tmp_path):
    def row(network: str, unit: str, paper: float) -> Row:
        return Row(unit, network, unit, "identity", {"cifar10": paper})

    rows = [
        row("preresnet20", "original", 5), row("preresnet20", "full_preactivation", 4),
        row("preresnet20", "bn_after_addition", 6), row("preresnet110", "original", 9),
    ]  # fmt: skip
    runs = Runs("title", rows)
    for at, error in zip(rows, (3.0, 2.0, 2.5, 1.0), strict=True):
        runs.add(at, 0, RunResult(error, 0.1, False), tmp_path)
    assert "Of 3 pairs" in order_told(runs)
    assert "2 stand in it here, 1 the other way round, 0 are equal" in order_told(runs)
    runs.add(rows[1], 1, RunResult(8.0, 0.1, False), tmp_path)
    assert runs.error(rows[1]) == 5.0


def test_another_data_set_is_called_so():
    told = remark(noise(), Recipe("noise", iterations=200, batch_size=32, warm_up=20).schedule)
    assert "The data set is another" in told
    assert "200 iterations of 32 images: rate 0.01 for the first 20, 0.1, divided by 10" in told
    assert "at 100 and 150. The paper: 64,000" in told
    assert "0.01 for the first 400, 0.1, divided by 10 at 32,000" in Recipe("noise").schedule


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The smallest networks and noise instead of digits: what is tested is the running."""

    def build(recipe: Recipe, classes: int) -> PreResNet:
        return PreResNet(
            "basic", [1], [4], classes, stem_channels=4, unit=recipe.unit,
            shortcut=shortcut_of(recipe.shortcut),
        )  # fmt: skip

    def read(folder: Path | None) -> Data:
        return noise()

    monkeypatch.setattr(Recipe, "build", build)
    monkeypatch.setitem(DATA, "digits", read)


def run(tmp_path: Path, *arguments: str) -> Result:
    fixed = ["study", "activations", "--quick", "--iterations", "4", "--batch-size", "8"]
    folders = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    return CliRunner().invoke(main, [*fixed, *folders, *arguments], catch_exceptions=False)


@pytest.mark.usefixtures("tiny")
def test_stopped_it_goes_on_and_ends_with_the_same_table(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "--seeds", "2")
    assert whole.exit_code == 0, whole.output
    assert "The data set is another" in whole.output
    original, started = study_module.run_shown, []

    def interrupted(trainer, title, stop):
        started.append(title)
        if len(started) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, title, stop)

    monkeypatch.setattr(study_module, "run_shown", interrupted)
    stopped = run(tmp_path / "parts", "--seeds", "2")
    assert stopped.exit_code == 130
    assert len(started) == 7
    file = "quick_study_activations_digits"
    partly = read_records(tmp_path / f"parts/results/{file}.csv")
    assert [record["seeds"] for record in partly] == ["2", "1", "1", "1", "1"]
    assert run(tmp_path / "parts", "--seeds", "2").exit_code == 0
    for name in (f"{file}.csv", f"{file}_curves.csv"):
        ends = [(tmp_path / part / "results" / name).read_text() for part in ("whole", "parts")]
        assert ends[0] == ends[1]
    assert (tmp_path / f"parts/results/{file}.png").stat().st_size > 0
    curves = read_records(tmp_path / f"parts/results/{file}_curves.csv")
    assert {record["quantity"] for record in curves} == {"loss", "test_error"}


@pytest.mark.usefixtures("tiny")
def test_what_cannot_run_is_refused(tmp_path):
    assert run(tmp_path, "--networks", "preresnet21").exit_code == 2
    result = run(tmp_path, "--data", "cifar10")
    assert result.exit_code == 2
    assert "--data-folder" in result.output
