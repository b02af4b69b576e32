"""``python -m benchmarks train``: one network by the paper's recipe; ``torchrun`` for several."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from preact import models
from preact.models import UNITS

from .data import load
from .options import recipe_fields, run_options
from .processes import joined
from .recipe import Recipe, shortcut_of
from .training import Notify, Result, Trainer

__all__ = ["run_shown", "stopped_by_signals", "train"]

QUICK = {
    "data": "digits", "network": "preresnet20", "iterations": 60, "batch_size": 32,
    "log_every": 10, "evaluate_every": 30,
}  # fmt: skip


@contextmanager
def stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Within, an interrupt or a termination asks the run to save and stop; a second one kills."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_of(recipe: Recipe, start: int, title: str, console: Console) -> Iterator[Notify]:
    """A progress bar, and the function that moves it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=recipe.iterations, completed=start)

        def notify(iteration: int, loss: float, error: float) -> None:
            text = f"{title}  loss {loss:.3f}  test error {error:.2f} %"
            progress.update(task, completed=iteration, description=text)

        yield notify


def run_shown(trainer: Trainer, title: str, stop: Callable[[], bool]) -> Result | None:
    """Run to the end or to a stop, with a progress bar in the first process."""
    console = Console(quiet=not trainer.processes.first)
    if 0 < trainer.iteration < trainer.recipe.iterations:
        console.print(f"{title}: continued after iteration {trainer.iteration}")
    with _progress_of(trainer.recipe, trainer.iteration, title, console) as notify:
        return trainer.run(notify, stop)


@click.command()
@run_options
@click.option("--network", help="A function of preact.models.  [preresnet110]")
@click.option("--unit", type=click.Choice(list(UNITS)), help="[full_preactivation]")
@click.option("--shortcut", help='Like "constant_scaling(0.5, 1)".  [identity]')
@click.option("--option", type=click.Choice(["A", "B"]), help="Where dimensions change.  [A]")
@click.option("--seed", type=int, help="[0]")
@click.option("--quick", is_flag=True, help="preresnet20, 60 iterations on 8x8 digits.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the run: checkpoint, logs, result. A run that is there is continued.",
)
def train(
    data_folder: Path | None,
    checkpoint_every: int,
    device: str,
    threads: int | None,
    quick: bool,
    output: Path,
    **options: Any,
) -> None:
    """Train one network by the paper's recipe, and continue it bit for bit after any stop.

    SGD with momentum 0.9 and weight decay 1e-4; the learning rate is a tenth for the first 400 of
    64,000 iterations, falls to a tenth at 32,000 and to a hundredth at 48,000, all in proportion to
    --iterations. Several processes: torchrun --nproc-per-node N -m benchmarks train ..., with
    synchronised batch norms and one batch between them.
    """
    recipe = Recipe(**recipe_fields(options, QUICK if quick else None))
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        shortcut_of(recipe.shortcut)
        if not hasattr(models, recipe.network):
            raise ValueError(f"preact.models has no network {recipe.network!r}")
        data = load(recipe.data, data_folder)
        with joined(device) as processes, stopped_by_signals() as asked:
            trainer = Trainer(recipe, data, output, processes, checkpoint_every)
            # Several processes would have to agree on when to stop; there, checkpoints serve.
            stop = asked if processes.count == 1 else lambda: False
            result = run_shown(trainer, f"{recipe.network} on {recipe.data}", stop)
    except (RuntimeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if not processes.first:
        return
    if result is None:
        click.echo(f"stopped after iteration {trainer.iteration}; the same command continues it")
        raise SystemExit(130)
    loss = "diverged" if result.diverged else f"training loss {result.train_loss:.4f}"
    click.echo(f"{data.title}: test error {result.test_error:.2f} %, {loss}")
    click.echo(f"wrote {output}")
