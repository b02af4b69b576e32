"""``python -m benchmarks breakdown``: where a training step's time goes, beside the conv floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import preact

from . import floor, hardware, timing
from .choices import Choices
from .networks import NETWORKS, Network
from .providers import PROVIDERS
from .records import Value, write_records
from .report import wide_console
from .workload import DTYPES, forward_backward, make_batch, make_step, settled_model, to_layout

__all__ = ["PARTS", "breakdown", "measure", "part_of"]

RESULTS = Path(__file__).parent / "results"
DEFAULT = "preresnet56,preresnet83,preresnet50,densenet121,resnet50"
PARTS = ("fused", "library convolutions", "passes", "other operations", "outside")
"""Fused units, prefixes and blocks; what the library convolves; our passes around that; all other
operations, the update among them; and what no operation accounts for: Python, autograd's engine,
the way into the operations."""
_OWN_PASSES = ("batch_norm_relu", "batch_norm_stats", "identity_add", "batch_norm_backward")


def part_of(name: str) -> str | None:
    """The part of an event of the profiler, by its name; None for what is no operation."""
    if name.startswith("preact::"):
        own = name.removeprefix("preact::")
        passes = own.startswith(_OWN_PASSES) and "conv2d" not in own
        return "passes" if passes or own == "update_running_stats" else "fused"
    if not name.startswith("aten::"):
        return None
    return "library convolutions" if "conv" in name else "other operations"


def measure(network: Network, dtype: str, rounds: int) -> dict[str, Value]:
    """Milliseconds of a step of preact on the CPU, channels_last: the whole, each part, the floor.

    The parts come from profiled steps and are scaled to the unprofiled one, whose ``outside`` is
    what is left of it.
    """
    device = torch.device("cpu")
    batch = make_batch(network, network.batch_size("cpu"), device, 0)
    batch = batch.to(memory_format=torch.channels_last)
    model = to_layout(settled_model(network, batch, 0, torch.no_grad), "channels_last")
    eager = PROVIDERS["eager"].prepare(model, network, "training")
    calls = floor.record(lambda: forward_backward(eager, batch, dtype, "training"))
    steps = {
        "step": make_step(
            PROVIDERS["preact"].prepare(model, network, "training"), batch, dtype, "training"
        ),
        "floor": floor.replay(calls),
    }
    clock = timing.clock("cpu")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        clock(step, 2)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1e3 * clock(step, 1))
    whole = statistics.median(times["step"])
    found = _profiled(steps["step"], rounds)
    row: dict[str, Value] = {
        "network": network.name, "dtype": dtype, "batch": network.batch_size("cpu"),
        "threads": torch.get_num_threads(), "step": whole,
        "floor": statistics.median(times["floor"]),
    }  # fmt: skip
    row["step / floor"] = whole / statistics.median(times["floor"])
    row.update({part: found.get(part, 0.0) for part in PARTS[:-1]})
    row[PARTS[-1]] = whole - sum(found.values())
    return row


def _profiled(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Milliseconds of each part but the last in one step, the median of ``rounds``."""
    every: list[dict[str, float]] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
            step()
        found = dict.fromkeys(PARTS[:-1], 0.0)
        for event in trace.events() or ():
            part = part_of(event.name)
            if part is not None:
                found[part] += event.self_cpu_time_total / 1e3
        every.append(found)
    return {part: statistics.median(one[part] for one in every) for part in PARTS[:-1]}


@click.command()
@click.option(
    "--networks", type=Choices(NETWORKS), default=DEFAULT, show_default=True, help="With commas."
)
@click.option("--dtypes", type=Choices(DTYPES), default="all", help="With commas.  [all]")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV file.  [benchmarks/results]",
)  # fmt: skip
def breakdown(networks: list[str], dtypes: list[str], rounds: int, output: Path) -> None:
    """Where a training step's time goes on the CPU, beside the convolutions alone."""
    console = wide_console()
    preact.retain_freed_memory()
    table = Table(title="milliseconds of a training step, channels_last", title_justify="left")
    for heading in ("network", "type", "step", "floor", "step / floor", *PARTS):
        table.add_column(heading)
    rows: list[dict[str, Value]] = []
    output.mkdir(parents=True, exist_ok=True)
    for name in networks:
        for dtype in dtypes:
            with console.status(f"{name}, {dtype}"):
                row = measure(NETWORKS[name], dtype, rounds)
            rows.append({**row, **hardware.describe(torch.device("cpu"), "retain")})
            table.add_row(
                name, dtype, f"{row['step']:.1f}", f"{row['floor']:.1f}",
                f"{row['step / floor']:.2f}", *(f"{row[part]:.1f}" for part in PARTS),
            )  # fmt: skip
            write_records(output / "breakdown.csv", rows)
    console.print(table)
    console.print(f"wrote {output / 'breakdown.csv'}", soft_wrap=True)
