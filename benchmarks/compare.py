"""``python -m benchmarks [compare]``: eager, torch.compile and preact on whole networks."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import preact
from preact import environment

from . import hardware, plots, report
from .cases import Case, Settings, reason, run_case
from .choices import Choices
from .networks import NETWORKS, Network, available
from .providers import BASELINE, PROVIDERS
from .rows import Row, write_csv
from .workload import DTYPES, LAYOUTS, MODES

__all__ = ["compare", "run"]

RESULTS = Path(__file__).parent / "results"
SECONDS, QUICK_SECONDS = 15.0, 4.0
MINUTES = 6.0
"""Of a run that names no network, on the slowest machine: as many cases as fit."""


def _list(console: Console) -> None:
    table = Table(title="networks", title_justify="left")
    for heading in ("name", "from", "image", "batch CPU", "batch CUDA", "runs", "missing"):
        table.add_column(heading)
    for network in NETWORKS.values():
        runs = "default" if network.default else "quick" if network.quick else "when named"
        size = f"{network.image_size}x{network.image_size}"
        batches = (str(network.batch_cpu), str(network.batch_cuda))
        table.add_row(network.name, network.source, size, *batches, runs, available(network))
    console.print(table)
    console.print(f"providers: {', '.join(PROVIDERS)}")
    console.print(f"dtypes: {', '.join(DTYPES)} (autocast)")
    console.print(f"modes: {', '.join(MODES)}")
    console.print(f"layouts: {', '.join(LAYOUTS)}")


def _networks(names: Sequence[str] | None, quick: bool, console: Console) -> list[Network]:
    if names is not None:
        for name in names:
            missing = available(NETWORKS[name])
            if missing:
                raise click.UsageError(f"{name}: {missing}")
        return [NETWORKS[name] for name in names]
    chosen = [n for n in NETWORKS.values() if (n.quick if quick else n.default)]
    for network in chosen:
        if available(network):
            console.print(f"left out: {network.name}, {available(network)}", style="yellow")
    return [network for network in chosen if not available(network)]


def _dtypes(
    names: Sequence[str] | None, quick: bool, target: torch.device, console: Console
) -> Sequence[str]:
    """Those named, else all the device is made for."""
    if names is not None:
        return names
    if quick:
        return DTYPES[:1]
    if target.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        console.print(
            "left out: bfloat16, whose convolutions PyTorch emulates on this processor at a tenth"
            " of float32's speed, minutes for each network; --dtypes all includes it",
            style="yellow",
        )
        return DTYPES[:1]
    return DTYPES


def _device(name: str) -> torch.device:
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise click.UsageError(f"--device {name}: only cpu and cuda can be timed here")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name}: {reason(error)}") from error


def run(
    cases: Sequence[Case],
    settings: Settings,
    csv: Path,
    conditions: dict[str, str],
    limit: float = math.inf,
) -> list[list[Row]]:
    """Run the cases with a progress bar and print a table for each.

    ``csv`` is written anew after every case, so an interrupted run keeps what it has. A case that
    would end later than ``limit`` seconds from now, should it take as long as its network's last
    one or, without one, the longest so far, is left out and named.
    """
    begin = time.monotonic()
    took: dict[str, float] = {}
    left_out: list[Case] = []
    console = report.wide_console()
    results: list[list[Row]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for index, case in enumerate(cases):
            start = time.monotonic()
            expected = took.get(case.network.name, max(took.values(), default=0.0))
            if start - begin + expected > limit:
                left_out.append(case)
                progress.update(task, completed=index + 1)
                continue

            def notify(text: str, done: float, case: Case = case, index: int = index) -> None:
                progress.update(task, description=f"{case}: {text}", completed=index + done)

            try:
                rows = run_case(case, settings, notify)
            except Exception as error:  # the other cases can still be measured
                rows = [_crashed(case, error)]
            took[case.network.name] = time.monotonic() - start
            results.append(rows)
            progress.console.print(report.case_table(_title(case, rows), rows))
            write_csv(csv, [row for rows in results for row in rows], conditions)
            progress.update(task, completed=index + 1)
    if left_out:
        names = "; ".join(map(str, left_out))
        console.print(f"left out after {limit / 60:g} minutes: {names}. --minutes 0 runs all")
    return results


def _crashed(case: Case, error: BaseException) -> Row:
    network = case.network
    row = Row(network.name, network.source, 0, network.image_size, case.dtype, case.mode, "all", "")
    row.parity, row.note = "error", reason(error)
    return row


def _title(case: Case, rows: Sequence[Row]) -> str:
    size = case.network.image_size
    return f"{case}, {rows[0].batch_size} images of {size}x{size}"


def _succeeded(results: Sequence[Sequence[Row]]) -> bool:
    """Whether nothing of ours, nor the baseline, failed; torch.compile may."""
    tolerated = {p.name for p in PROVIDERS.values() if not p.ours and p.name != BASELINE}
    return not any(
        row.parity in ("FAILED", "error") and row.provider not in tolerated
        for rows in results
        for row in rows
    )


@click.command("compare")
@click.option("--list", "list_only", is_flag=True, help="Show what can be measured, and stop.")
@click.option("--quick", is_flag=True, help="About a minute: preresnet20, float32, no compile.")
@click.option("--networks", type=Choices(NETWORKS), help="Names with commas, or all.")
@click.option("--providers", type=Choices(PROVIDERS), help="Eager always runs.  [all but folded]")
@click.option(
    "--dtypes", type=Choices(DTYPES), help="bfloat16 is autocast.  [those the device has]"
)
@click.option("--modes", type=Choices(MODES), default="all", show_default=True)
@click.option(
    "--layouts",
    type=Choices(LAYOUTS),
    help="[channels_last on a CPU, where it is the fastest for every provider; else all]",
)
@click.option("--device", help="cuda, cuda:1, cpu.  [cuda if there is one, else cpu]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads on the CPU.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Instead of each network's own.")
@click.option("--rounds", type=click.IntRange(min=1), default=25, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="No new timing round of a case after this long, once there are five.  [15]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    help="Leave out cases that would end later than this; 0 for all.  [6; 0 with --networks]",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--allocator",
    type=click.Choice(["default", "retain"]),
    default="default",
    show_default=True,
    help="retain: the C allocator keeps freed memory, which avoids page faults.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder for the CSV and the plots.  [benchmarks/results]",
)
def compare(
    list_only: bool,
    quick: bool,
    networks: list[str] | None,
    providers: list[str] | None,
    dtypes: list[str] | None,
    modes: list[str],
    layouts: list[str] | None,
    device: str | None,
    threads: int | None,
    batch_size: int | None,
    rounds: int,
    seconds: float | None,
    minutes: float | None,
    seed: int,
    allocator: str,
    output: Path,
) -> None:
    """Compare eager PyTorch, torch.compile and preact on whole networks.

    Results are compared before anything is timed. A provider whose results are wrong gets no speed
    figure, and the exit status is 1 if that is preact.
    """
    console = report.wide_console()
    if list_only:
        _list(console)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    if allocator == "retain":
        try:
            preact.retain_freed_memory()
        except RuntimeError as error:
            raise click.UsageError(f"{error}; use --allocator default") from error
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = _device(chosen)
    if target.type == "cuda":
        torch.cuda.set_device(target)
        torch.backends.cudnn.benchmark = True  # eager at its best
    if seconds is None:
        seconds = QUICK_SECONDS if quick else SECONDS
    if minutes is None:
        minutes = 0.0 if quick or networks else MINUTES
    if layouts is None:
        layouts = ["channels_last"] if target.type == "cpu" else list(LAYOUTS)
    names = providers or [
        n for n, p in PROVIDERS.items() if not (p.asked_only or (quick and p.compiles))
    ]
    settings = Settings(
        target, [PROVIDERS[n] for n in names], layouts, rounds, seconds, batch_size, seed
    )
    chosen_networks = _networks(networks, quick, console)
    chosen_types = _dtypes(dtypes, quick, target, console)
    # The most telling first, for a run that ends before all of them.
    cases = [
        Case(network, dtype, mode)
        for mode in modes
        for dtype in chosen_types
        for network in chosen_networks
    ]
    conditions = hardware.describe(target, allocator)
    described = (
        "hardware",
        "capability",
        "threads",
        "allocator",
        "load",
        "torch",
        "preact",
        "backends",
    )
    console.print(", ".join(f"{key} {conditions[key]}" for key in described))
    if target.type == "cpu" and float(conditions["load"] or 0) > (os.cpu_count() or 1) / 2:
        console.print("other programs are running: the figures will be poor", style="yellow")
    if not quick:
        within = f", those that fit in {minutes:g} minutes" if minutes else ""
        console.print(f"{len(cases)} cases{within}; --quick takes about a minute")
    output.mkdir(parents=True, exist_ok=True)
    csv = output / f"{'quick_' if quick else ''}{target.type}.csv"
    results = run(cases, settings, csv, conditions, 60 * minutes or math.inf)
    for name in names:
        if PROVIDERS[name].ours:
            console.print(report.summary_table(results, name))
            console.print("\n".join(environment.choices(target.type)), highlight=False)
    for path in (csv, *plots.draw(csv)):
        console.print(f"wrote {path}", soft_wrap=True)
    if not _succeeded(results):
        console.print("some results are wrong or missing: see FAILED and error", style="bold red")
        sys.exit(1)
