"""``python -m benchmarks faults``: training steps of one provider alone in its process.

Providers that take turns in one process share its heap: what one keeps at the heap's end keeps the
allocator from giving back what another freed. How often pages come anew, and what that costs, only
a process of its own shows.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
import torch
from rich.table import Table

import preact

from . import hardware, timing
from .choices import Choices
from .networks import NETWORKS
from .processes import in_new_process
from .providers import PROVIDERS
from .records import Value, write_records
from .report import wide_console
from .workload import DTYPES, make_batch, make_step, settled_model, to_layout

__all__ = ["ALLOCATORS", "faults", "steps_alone"]

RESULTS = Path(__file__).parent / "results"
ALLOCATORS = ("default", "retain")
_WARM = 4
_PROVIDERS = ("preact", "eager")


def steps_alone(
    network: str, dtype: str, provider: str, allocator: str, steps: int, threads: int
) -> tuple[float, float]:
    """Seconds of a training step and its page faults, channels_last on the CPU; medians of
    ``steps``. To run in a process of its own, whose allocator is set."""
    torch.set_num_threads(threads)
    if allocator == "retain":
        preact.retain_freed_memory()
    net = NETWORKS[network]
    batch = make_batch(net, net.batch_size("cpu"), torch.device("cpu"), 0)
    batch = batch.to(memory_format=torch.channels_last)
    model = to_layout(settled_model(net, batch, 0, torch.no_grad), "channels_last")
    prepared = PROVIDERS[provider].prepare(model, net, "training")
    step = make_step(prepared, batch, dtype, "training")
    clock = timing.clock("cpu")
    clock(step, _WARM)
    seconds, faults = [], []
    for _ in range(steps):
        before = timing.page_faults()
        seconds.append(clock(step, 1))
        faults.append(timing.page_faults() - before)
    return statistics.median(seconds), statistics.median(faults)


@click.command()
@click.option(
    "--networks",
    type=Choices(NETWORKS),
    default="preresnet56,preresnet83,densenet121",
    show_default=True,
    help="With commas.",
)
@click.option("--dtypes", type=Choices(DTYPES), default="all", help="With commas.  [all]")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Processes of each kind, which take turns.",
)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV file.  [benchmarks/results]",
)  # fmt: skip
def faults(networks: list[str], dtypes: list[str], rounds: int, steps: int, output: Path) -> None:
    """Training steps and their page faults, each provider alone in its process, as the C allocator
    is and told to keep freed memory (``preact.retain_freed_memory``)."""
    console = wide_console()
    table = Table(title="training steps, a process each, channels_last", title_justify="left")
    for heading in (
        "network",
        "type",
        "provider",
        "allocator",
        "ms",
        "lowest",
        "highest",
        "faults",
    ):
        table.add_column(heading)
    kinds = [(provider, allocator) for provider in _PROVIDERS for allocator in ALLOCATORS]
    threads = torch.get_num_threads()
    records: list[dict[str, Value]] = []
    output.mkdir(parents=True, exist_ok=True)
    for network in networks:
        for dtype in dtypes:
            found: dict[tuple[str, str], list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for number in range(rounds):
                for kind in kinds:
                    with console.status(
                        f"{network}, {dtype}, {' '.join(kind)}, round {number + 1}"
                    ):
                        one = in_new_process(steps_alone, network, dtype, *kind, steps, threads)
                    found[kind].append(one)
            for (provider, allocator), each in found.items():
                times = [1e3 * seconds for seconds, _ in each]
                row: dict[str, Value] = {
                    "network": network, "dtype": dtype, "provider": provider,
                    "ms": statistics.median(times), "lowest_ms": min(times),
                    "highest_ms": max(times), "faults": statistics.median(f for _, f in each),
                    "processes": rounds, "steps": steps,
                }  # fmt: skip
                table.add_row(
                    network, dtype, provider, allocator,
                    *(f"{row[key]:.1f}" for key in ("ms", "lowest_ms", "highest_ms")),
                    f"{row['faults']:.0f}",
                )  # fmt: skip
                records.append({**row, **hardware.describe(torch.device("cpu"), allocator)})
            write_records(output / "faults.csv", records)
    console.print(table)
    console.print(f"wrote {output / 'faults.csv'}", soft_wrap=True)
