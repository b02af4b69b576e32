"""``python -m benchmarks race``: fused and eager training from the same seeds, turn by turn."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from preact import models

from .data import Data, load
from .options import recipe_fields, run_options
from .processes import Processes
from .recipe import Recipe
from .records import Value, read_records, write_records
from .report import wide_console
from .train import stopped_by_signals
from .training import Trainer

__all__ = ["Turn", "race", "reached", "run_seed"]

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("preact", "eager")
CLOCKS = {"cpu": "processor", "wall": "elapsed"}
QUICK = {
    "data": "digits", "network": "preresnet20", "iterations": 20, "batch_size": 32,
    "evaluate_every": 5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turn:
    """Where a provider stands after its turn; seconds are of training alone, since the start."""

    provider: str
    seed: int
    iteration: int
    cpu_seconds: float
    wall_seconds: float
    train_loss: float
    test_error: float


def _read(path: Path) -> list[Turn]:
    kinds = {"provider": str, "seed": int, "iteration": int}
    if not path.exists():
        return []
    rows = read_records(path)
    return [Turn(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in rows]


def _turn(trainer: Trainer, provider: str, before: Turn | None, steps: int) -> Turn:
    cpu, wall = time.process_time(), time.perf_counter()
    with trainer.context():
        losses = [float(trainer.step()) for _ in range(steps)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        _, error = trainer.evaluate(trainer.data.test)
    if before is not None:
        cpu, wall = cpu + before.cpu_seconds, wall + before.wall_seconds
    seed = trainer.recipe.seed
    mean = statistics.fmean(losses)
    return Turn(provider, seed, trainer.iteration, cpu, wall, mean, error)


def run_seed(
    recipe: Recipe, data: Data, folder: Path, device: str, stop: Callable[[], bool]
) -> list[Turn] | None:
    """Both providers from one seed, ``evaluate_every`` iterations by turns; None where stopped.

    ``folder`` keeps the turns and a checkpoint after each: what is there is continued.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "turns.csv"
    alone = Processes(0, 1, torch.device(device))
    trainers = {
        provider: Trainer(
            dataclasses.replace(recipe, eager=provider == "eager"), data, folder / provider, alone,
            recipe.iterations,
        )
        for provider in PROVIDERS
    }  # fmt: skip
    turns = [t for t in _read(path) if t.iteration <= trainers[t.provider].iteration]
    while trainers[PROVIDERS[-1]].iteration < recipe.iterations:
        for provider, trainer in trainers.items():
            if provider == PROVIDERS[0] and trainer.iteration > trainers["eager"].iteration:
                continue
            if stop():
                return None
            last = [turn for turn in turns if turn.provider == provider]
            steps = min(recipe.evaluate_every, recipe.iterations - trainer.iteration)
            turns.append(_turn(trainer, provider, last[-1] if last else None, steps))
            # The turn first: a checkpoint without one would leave its seconds out.
            write_records(path, [dataclasses.asdict(turn) for turn in turns])
            trainer.save()
    return turns


def reached(
    turns: Sequence[Turn], provider: str, seed: int, error: float, clock: str = "cpu"
) -> float | None:
    """Seconds of training until the first look at the test images without more errors."""
    for turn in turns:
        if (turn.provider, turn.seed) == (provider, seed) and turn.test_error <= error:
            return _seconds(turn, clock)
    return None


def _seconds(turn: Turn, clock: str) -> float:
    return turn.cpu_seconds if clock == "cpu" else turn.wall_seconds


def _ratio(turns: Sequence[Turn], seeds: Sequence[int], error: float, clock: str) -> list[float]:
    """Eager's time over ours until ``error``, of the seeds where both came there."""
    ratios = []
    for seed in seeds:
        ours, theirs = (reached(turns, provider, seed, error, clock) for provider in PROVIDERS)
        if ours is not None and theirs is not None:
            ratios.append(theirs / ours)
    return ratios


def _spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f} ({low}-{high})"


def told(
    turns: Sequence[Turn], title: str, clock: str = "cpu"
) -> tuple[Table, list[dict[str, Value]]]:
    """Final errors and time to accuracy, over the finished seeds."""
    seeds = sorted({turn.seed for turn in turns})
    final: dict[str, list[Turn]] = {p: [] for p in PROVIDERS}
    for provider in PROVIDERS:
        for seed in seeds:
            final[provider].append(
                [t for t in turns if (t.provider, t.seed) == (provider, seed)][-1]
            )
    # An accuracy that both providers end at in every seed, so that none is left out.
    goal = max(turn.test_error for runs in final.values() for turn in runs)
    ratios = _ratio(turns, seeds, goal, clock)
    whole = [_seconds(b, clock) / _seconds(a, clock) for a, b in zip(*final.values(), strict=True)]
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in ("provider", "test error %", f"s to {goal:.2f} %", "s in all", "seeds"):
        table.add_column(heading)
    records: list[dict[str, Value]] = []
    for provider, runs in final.items():
        times = [reached(turns, provider, seed, goal, clock) or float("nan") for seed in seeds]
        errors, seconds = [t.test_error for t in runs], [_seconds(t, clock) for t in runs]
        table.add_row(
            provider, _spread(errors), _spread(times, 1), _spread(seconds, 1), str(len(seeds))
        )
        records.append(
            {
                "provider": provider, "seeds": len(seeds),
                "median_error": statistics.median(errors),
                "lowest_error": min(errors), "highest_error": max(errors), "goal_error": goal,
                "clock": clock, "median_seconds_to_goal": statistics.median(times),
                "median_seconds": statistics.median(seconds),
                "eager_over_preact_to_goal": statistics.median(ratios),
                "eager_over_preact": statistics.median(whole),
            }
        )  # fmt: skip
    table.caption = (
        f"Time of eager over ours: {_spread(ratios)} until {goal:.2f} %, {_spread(whole)} in all;"
        f" {CLOCKS[clock]} seconds of training, looks at the test images left out."
    )
    return table, records


@click.command()
@run_options
@click.option("--network", help="A function of preact.models.  [preresnet110]")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="preresnet20, 20 iterations on 8x8 digits.")
@click.option(
    "--runs", type=click.Path(file_okay=False, path_type=Path), default=Path("runs"),
    show_default=True, help="Folder for a folder of each run; what is there is continued.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV files.  [benchmarks/results]",
)  # fmt: skip
def race(
    data_folder: Path | None,
    checkpoint_every: int,
    device: str,
    threads: int | None,
    seeds: int,
    clock: str,
    quick: bool,
    runs: Path,
    output: Path,
    **options: Any,
) -> None:
    """Train fused and eager from the same seeds: the accuracy of both, and the time to it.

    The two take turns of --evaluate-every iterations, so that what else the machine does meets
    both. Processor seconds serve on a machine that does much else, with one thread, as waiting
    threads count as well; --clock wall where nothing else runs.
    """
    del checkpoint_every  # one after every turn
    if options.pop("eager"):
        raise click.UsageError("--eager: a race runs both")
    fields = recipe_fields(options, QUICK if quick else None)
    if threads is not None:
        torch.set_num_threads(threads)
    console = wide_console()
    turns: list[Turn] = []
    try:
        recipe = Recipe(**fields)
        if not hasattr(models, recipe.network):
            raise ValueError(f"preact.models has no network {recipe.network!r}")
        stem = f"{'quick_' if quick else ''}race_{recipe.network}_{recipe.data}"
        data = load(recipe.data, data_folder)
        output.mkdir(parents=True, exist_ok=True)
        with stopped_by_signals() as stop:
            for seed in range(seeds):
                one = dataclasses.replace(recipe, seed=seed)
                found = run_seed(one, data, runs / stem / f"seed{seed}", device, stop)
                if found is None:
                    console.print("stopped; the same command goes on from here")
                    raise SystemExit(130)
                turns += found
                title = f"{recipe.network} on {data.title}"
                table, records = told(turns, title, clock)
                write_records(output / f"{stem}.csv", records)
                write_records(output / f"{stem}_turns.csv", [vars(turn) for turn in turns])
    except (RuntimeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    console.print(table)
    console.print(f"wrote {output / stem}.csv and _turns.csv", soft_wrap=True)
