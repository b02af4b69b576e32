"""``python -m benchmarks signal``: signal and gradient by depth, and the identities they obey."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from rich.table import Table

import preact
from preact import models
from preact.models import UNITS, shortcuts
from preact.models.shortcuts import Shortcut

from .records import write_records
from .report import wide_console
from .signal_flow import Stage, UnitSignal, measure

__all__ = ["CASES", "signal"]

RESULTS = Path(__file__).parent / "results"

CASES: dict[str, Shortcut] = {
    "identity": shortcuts.identity(),
    **{f"lambda {scale:g}": shortcuts.constant_scaling(scale, 1.0) for scale in (0.9, 0.5, 1.1, 0)},
    "scaling 0.5, 0.5": shortcuts.constant_scaling(0.5, 0.5),
    **{f"exclusive gating, b={b}": shortcuts.exclusive_gating(b) for b in (0, -5, -6, -7)},
    **{f"shortcut-only gating, b={b}": shortcuts.shortcut_only_gating(b) for b in (0, -6)},
    "1x1 convolution": shortcuts.convolution(),
    "dropout 0.5": shortcuts.dropout(0.5),
}


def run_case(
    network: str, unit: str, shortcut: Shortcut, batch: int, seed: int
) -> tuple[list[UnitSignal], list[Stage]]:
    """A new network in float64, on random images and labels."""
    torch.manual_seed(seed)
    model = getattr(models, network)(unit=unit, shortcut=shortcut, option="A").double()
    model.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    return measure(model, images, torch.randint(0, 10, (batch,)))


def draw(results: dict[str, list[UnitSignal]], title: str, path: Path) -> None:
    """Four panels over depth, a line for each case."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    for axes, quantity, label in zip(
        panels,
        ("signal", "gradient", "direct", "through"),
        (
            "root mean square of the unit's input",
            "norm of the gradient of the unit's input",
            "its term through the shortcuts alone",
            "its term through the weights",
        ),
        strict=True,
    ):
        for number, (name, signals) in enumerate(results.items()):
            values = [getattr(s, quantity) for s in signals]
            style = "-" if number < 7 else "--"
            axes.plot([s.unit for s in signals], values, style, lw=1.4, label=name)
        axes.set_yscale("log")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("unit")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)


@click.command()
@click.option("--network", default="preresnet110", show_default=True, help="Of CIFAR's, by name.")
@click.option("--unit", type=click.Choice(list(UNITS)), default="full_preactivation")
@click.option("--batch-size", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eager", is_flag=True, help="Run the network in eager PyTorch.")
@click.option("--quick", is_flag=True, help="preresnet20 with 2 images: a few seconds.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV files and the plot.  [benchmarks/results]",
)  # fmt: skip
def signal(
    network: str, unit: str, batch_size: int, seed: int, eager: bool, quick: bool, output: Path
) -> None:
    """Follow signal and gradient through a network, for every shortcut of the paper.

    Over each stage, x_L against the shortcuts' product times x_l plus the sum of the branches, and
    the gradient of x_l against its two terms; the network is new, its images are random. Where the
    unit has an activation after its addition (f is no identity) the two sides differ, and by how
    much is shown.
    """
    if not hasattr(models, network):
        raise click.UsageError(f"--network {network}: preact.models has none of that name")
    if quick:
        network, batch_size = "preresnet20", 2
    table = Table(title=f"{network}, {unit}", title_justify="left")
    for heading in ("shortcut", "stage", "x_L, relative error", "gradient, relative error"):
        table.add_column(heading)
    results: dict[str, list[UnitSignal]] = {}
    signals_csv: list[dict[str, str | int | float]] = []
    stages_csv: list[dict[str, str | int | float]] = []
    with preact.use_backend("reference" if eager else preact.backends.choose("cpu")):
        for name, shortcut in CASES.items():
            results[name], stages = run_case(network, unit, shortcut, batch_size, seed)
            head = {"network": network, "unit_kind": unit, "shortcut": name}
            signals_csv += [{**head, **vars(s)} for s in results[name]]
            stages_csv += [{**head, **vars(s)} for s in stages]
            for stage in stages:
                errors = (f"{stage.signal_error:.1e}", f"{stage.gradient_error:.1e}")
                table.add_row(name, str(stage.stage), *errors)
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{'quick_' if quick else ''}signal_{network}_{unit}"
    written = [output / f"{stem}.csv", output / f"{stem}_identities.csv", output / f"{stem}.png"]
    write_records(written[0], signals_csv)
    write_records(written[1], stages_csv)
    draw(results, f"{network}, {unit}, untrained, {batch_size} random images", written[2])
    console = wide_console()
    console.print(table)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
