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

from .data import DATA, load
from .processes import Processes, joined
from .recipe import TYPES, Recipe, shortcut_of
from .training import Notify, Result, Trainer

__all__ = ["progress_of", "stopped_by_signals", "train"]

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
def progress_of(recipe: Recipe, start: int, title: str, console: Console) -> Iterator[Notify]:
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


def _recipe(options: dict[str, Any], quick: bool) -> Recipe:
    given = {name: value for name, value in options.items() if value is not None}
    return Recipe(**{**(QUICK if quick else {}), **given})


def _train(
    recipe: Recipe, folder: Path | None, output: Path, processes: Processes, every: int
) -> tuple[Result | None, Trainer]:
    trainer = Trainer(recipe, load(recipe.data, folder), output, processes, every)
    console = Console(quiet=not processes.first)
    if trainer.iteration:
        console.print(f"continued after iteration {trainer.iteration}")
    title = f"{recipe.network} on {recipe.data}"
    if processes.count > 1:  # they would have to agree on when to stop: checkpoints serve there
        with progress_of(recipe, trainer.iteration, title, console) as notify:
            return trainer.run(notify), trainer
    with (
        stopped_by_signals() as stop,
        progress_of(recipe, trainer.iteration, title, console) as notify,
    ):
        return trainer.run(notify, stop), trainer


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), help="The data set.  [digits if --quick]")
@click.option(
    "--data-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that holds CIFAR as torchvision keeps it; nothing is downloaded.",
)
@click.option("--network", help="A function of preact.models.  [preresnet110]")
@click.option("--unit", type=click.Choice(list(UNITS)), help="[full_preactivation]")
@click.option("--shortcut", help='Like "constant_scaling(0.5, 1)".  [identity]')
@click.option("--option", type=click.Choice(["A", "B"]), help="Where dimensions change.  [A]")
@click.option("--iterations", type=click.IntRange(min=1), help="[64000]")
@click.option("--batch-size", type=click.IntRange(min=2), help="Of all processes.  [128]")
@click.option("--accumulate", type=click.IntRange(min=1), help="Parts of a batch.  [1]")
@click.option("--learning-rate", type=float, help="[0.1]")
@click.option("--dtype", type=click.Choice(TYPES), help="bfloat16 is autocast.  [float32]")
@click.option("--seed", type=int, help="[0]")
@click.option("--eager", is_flag=True, help="Eager PyTorch instead of the fused kernels.")
@click.option("--evaluate-every", type=click.IntRange(min=1), help="Iterations.  [1000]")
@click.option("--log-every", type=click.IntRange(min=1), help="Iterations.  [100]")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of this process.")
@click.option("--quick", is_flag=True, help="preresnet20, 60 iterations on 8x8 digits.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder of the run: checkpoint, logs, result. A run that is there is continued.",
)  # fmt: skip
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
    if options["data"] is None and not quick:
        raise click.UsageError("--data is needed: " + ", ".join(DATA))
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        recipe = _recipe(options, quick)
        shortcut_of(recipe.shortcut)
        if not hasattr(models, recipe.network):
            raise ValueError(f"preact.models has no network {recipe.network!r}")
        with joined(device) as processes:
            result, trainer = _train(recipe, data_folder, output, processes, checkpoint_every)
            first = processes.first
    except (RuntimeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if not first:
        return
    if result is None:
        click.echo(f"stopped after iteration {trainer.iteration}; the same command continues it")
        raise SystemExit(130)
    loss = "diverged" if result.diverged else f"training loss {result.train_loss:.4f}"
    click.echo(f"{trainer.data.title}: test error {result.test_error:.2f} %, {loss}")
    click.echo(f"wrote {output}")
