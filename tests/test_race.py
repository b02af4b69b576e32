"""``benchmarks race`` and ``memory``: fused beside eager in time to accuracy and in bytes held."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks import memory_step, race
from benchmarks.__main__ import main
from benchmarks.data import DATA, Data
from benchmarks.memory_step import GIB, Step, measured
from benchmarks.race import Turn, reached, told
from benchmarks.recipe import Recipe, shortcut_of
from benchmarks.records import read_records
from preact.models import PreResNet

from .test_train import noise, one_thread  # noqa: F401


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def build(recipe: Recipe, classes: int) -> PreResNet:
        return PreResNet(
            "basic", [1], [4], classes, stem_channels=4, shortcut=shortcut_of(recipe.shortcut)
        )

    def read(folder: Path | None) -> Data:
        return noise()

    monkeypatch.setattr(Recipe, "build", build)
    monkeypatch.setitem(DATA, "digits", read)


def run(tmp_path: Path, *arguments: str) -> Result:
    fixed = ["race", "--quick", "--iterations", "5", "--evaluate-every", "2", "--batch-size", "8"]
    folders = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    return CliRunner().invoke(
        main, [*fixed, "--seeds", "2", *folders, *arguments], catch_exceptions=False
    )


def what_was_learnt(tmp_path: Path) -> list[tuple[str, ...]]:
    rows = read_records(tmp_path / "results/quick_race_preresnet20_digits_turns.csv")
    names = ("provider", "seed", "iteration", "train_loss", "test_error")
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.usefixtures("tiny")
def test_both_take_turns_and_a_stopped_race_goes_on(tmp_path, monkeypatch):
    assert run(tmp_path / "whole").exit_code == 0
    whole = what_was_learnt(tmp_path / "whole")
    order = [("preact", "2"), ("eager", "2"), ("preact", "4"), ("eager", "4")]
    order += [("preact", "5"), ("eager", "5")]
    assert [(row[0], row[2]) for row in whole] == order * 2
    for ours, theirs in zip(whole[::2], whole[1::2], strict=True):
        assert math.isclose(float(ours[3]), float(theirs[3]), rel_tol=1e-4)  # the same seed
    original, turns = race._turn, []

    def killed(*arguments):
        turns.append(1)
        if len(turns) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(race, "_turn", killed)
    assert run(tmp_path / "parts").exit_code == 1
    monkeypatch.setattr(race, "_turn", original)
    assert run(tmp_path / "parts").exit_code == 0
    assert what_was_learnt(tmp_path / "parts") == whole
    for row in read_records(tmp_path / "parts/results/quick_race_preresnet20_digits.csv"):
        assert float(row["eager_over_preact"]) > 0


def test_time_to_accuracy_is_to_what_every_run_ends_at():
    curves = {
        ("preact", 0): (50.0, 20.0, 10.0), ("eager", 0): (40.0, 9.0, 9.0),
        ("preact", 1): (30.0, 12.0, 8.0), ("eager", 1): (30.0, 30.0, 12.0),
    }  # fmt: skip
    turns = [
        Turn(provider, seed, i, (i + 1) * (3.0 if provider == "eager" else 2.0), 0.0, 0.0, error)
        for (provider, seed), errors in curves.items()
        for i, error in enumerate(errors)
    ]
    assert reached(turns, "preact", 0, 12.0) == 6.0
    assert reached(turns, "preact", 0, 9.0) is None
    _, (ours, theirs) = told(turns, "title")
    assert ours["goal_error"] == 12.0
    assert (ours["median_error"], theirs["median_error"]) == (9.0, 10.5)
    # Seed 0: 6 of eager's seconds to 6 of ours; seed 1: 9 to 4.
    assert ours["eager_over_preact_to_goal"] == (6 / 6 + 9 / 4) / 2
    assert ours["eager_over_preact"] == 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="resident bytes are read from /proc")
def test_memory_of_a_step_and_its_limit():
    ours = measured("preresnet20", 16, False, 64 * GIB, 1)
    theirs = measured("preresnet20", 16, True, 64 * GIB, 1)
    assert ours is not None
    assert theirs is not None
    assert ours.saved < 0.6 * theirs.saved
    assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)
    for step in (ours, theirs):
        assert step.peak_rss - step.base_rss > step.saved / 2
    assert measured("preresnet20", 30_000, False, 6 * GIB, 1) is None


def test_what_does_not_fit_is_measured_smaller_and_said(tmp_path, monkeypatch):
    def measured(network, batch_size, eager, limit, threads):
        if eager and batch_size == 128:
            return None
        base = 1 * GIB
        return Step(batch_size, base + batch_size * GIB // 16, base, batch_size * GIB // 32, 1.0, 1)

    monkeypatch.setattr(memory_step, "measured", measured)
    result = CliRunner().invoke(main, ["memory", "--output", str(tmp_path)], catch_exceptions=False)
    assert "batch 32, scaled" in result.output
    ours, theirs = read_records(tmp_path / "memory_preresnet1001.csv")
    assert (ours["fits"], ours["measured_batch_size"]) == ("1", "128")
    assert (theirs["fits"], theirs["measured_batch_size"]) == ("0", "32")
    assert float(theirs["peak_rss_gib"]) == 9.0
    assert float(theirs["saved_gib"]) == 4.0
