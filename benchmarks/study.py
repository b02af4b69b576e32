"""``python -m benchmarks study NAME``: Tables 1 to 3 of the paper, run by run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from preact import models

from .data import Data, load
from .options import recipe_fields, run_options
from .processes import Processes
from .recipe import Recipe
from .records import write_records
from .report import wide_console
from .studies import STUDIES, Row
from .study_results import Runs, draw_curves, order_told, summary, table_of
from .train import run_shown, stopped_by_signals
from .training import Result, Trainer

__all__ = ["study"]

RESULTS = Path(__file__).parent / "results"
QUICK = {
    "data": "digits", "iterations": 20, "batch_size": 32, "log_every": 5, "evaluate_every": 10,
}  # fmt: skip


def _write(stem: Path, runs: Runs, data: Data) -> None:
    """Table, CSV files and curves of the runs that are finished."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_records(stem.with_name(f"{stem.name}.csv"), summary(runs, data))
    write_records(stem.with_name(f"{stem.name}_curves.csv"), runs.curves())
    draw_curves(runs, data, stem.with_name(f"{stem.name}.png"))


def _networks(_: click.Context, __: click.Parameter, value: str | None) -> list[str]:
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    for name in names:
        if not hasattr(models, name):
            raise click.BadParameter(f"preact.models has no network {name!r}")
    return names


@click.command()
@click.argument("name", type=click.Choice(list(STUDIES)))
@run_options
@click.option("--networks", callback=_networks, help="With commas.  [those of the table]")
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each row.  [5; 1 if --quick]")
@click.option("--quick", is_flag=True, help="preresnet20, 20 iterations on 8x8 digits, one seed.")
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder for a folder of each run; runs that are there are continued or kept.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder for the table and the curves.  [benchmarks/results]",
)
def study(
    name: str,
    data_folder: Path | None,
    checkpoint_every: int,
    device: str,
    threads: int | None,
    networks: list[str],
    seeds: int | None,
    quick: bool,
    runs: Path,
    output: Path,
    **options: Any,
) -> None:
    """Train every row of a table of the paper, several seeds each, and set both figures abreast.

    NAME is shortcuts (Table 1), activations (Table 2) or depth (Table 3). It can be stopped at any
    time: the same command goes on where it was. The first seed of every row comes first, then the
    second of every row; table and curves are written after each run.
    """
    console = wide_console()
    fields = recipe_fields(options, QUICK if quick else None)
    named = networks
    if quick and not networks:
        networks = ["preresnet20"]
    if threads is not None:
        torch.set_num_threads(threads)
    rows = STUDIES[name].in_networks(networks)
    done = Runs(STUDIES[name].title, rows, Recipe(**fields).schedule)
    here = "quick_" if quick else ""
    file = f"{here}study_{name}_{fields['data']}"
    stem = output / "_".join([file, *named])
    try:
        data = load(fields["data"], data_folder)
        with stopped_by_signals() as stop:
            for seed in range(seeds or (1 if quick else 5)):
                for row in rows:
                    folder = runs / file / row.key / f"seed{seed}"
                    result = _run(row, seed, fields, data, folder, device, checkpoint_every, stop)
                    if result is None:
                        console.print("stopped; the same command goes on from here")
                        raise SystemExit(130)
                    done.add(row, seed, result, folder)
                    _write(stem, done, data)
    except (RuntimeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    console.print(table_of(done, data))
    console.print(order_told(done))
    console.print(f"wrote {stem}.csv, .png and _curves.csv", soft_wrap=True)


def _run(
    row: Row, seed: int, fields: dict[str, Any], data: Data, folder: Path, device: str,
    checkpoint_every: int, stop: Any,
) -> Result | None:  # fmt: skip
    recipe = Recipe(
        **fields, network=row.network, unit=row.unit, shortcut=row.shortcut, option=row.option,
        seed=seed,
    )  # fmt: skip
    alone = Processes(0, 1, torch.device(device))
    trainer = Trainer(recipe, data, folder, alone, checkpoint_every)
    return run_shown(trainer, f"{row.network} {row.unit} {row.shortcut}, seed {seed}", stop)
