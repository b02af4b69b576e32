"""``python -m benchmarks memory``: what one training step of a large network holds, by process."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.table import Table

import preact
from preact import models

from .memory import saved_bytes
from .processes import in_new_process
from .records import Value, write_records
from .report import wide_console

__all__ = ["Step", "measured", "memory", "one_step"]

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
_SMALLER = 4


@dataclass(frozen=True)
class Step:
    """One step in a process of its own.

    Attributes:
        peak_rss: most bytes resident during the step, torch itself and the weights included.
        base_rss: bytes resident before it.
        saved: bytes that autograd keeps for backward, weights left out.
        loss: of the step, so that two providers can be told to have done the same.
    """

    batch_size: int
    peak_rss: int
    base_rss: int
    saved: int
    loss: float
    seconds: float

    def scaled(self, batch_size: int) -> tuple[float, float]:
        """Peak and saved bytes at another batch, in proportion to it above the base."""
        factor = batch_size / self.batch_size
        return self.base_rss + (self.peak_rss - self.base_rss) * factor, self.saved * factor


def _resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes; getrusage's peak can be the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def one_step(network: str, batch_size: int, eager: bool, limit: int, threads: int) -> Step | None:
    """Forward, backward and update of SGD; None where ``limit`` bytes of address space are few.

    To run in a process of its own: the limit stays, and the peak is the process's.
    """
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backend = "reference" if eager else preact.backends.choose("cpu")
    try:
        model = getattr(models, network)(option="B").to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch_size,))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        base = _resident("VmRSS")
        with preact.use_backend(backend):
            start = time.perf_counter()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            seconds = time.perf_counter() - start
            peak = _resident("VmHWM")
            saved = saved_bytes(lambda: F.cross_entropy(model(images), labels), model)
    except MemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "bad_alloc" not in str(error):
            raise
        return None
    return Step(batch_size, peak, base, saved, float(loss.detach()), seconds)


def measured(network: str, batch_size: int, eager: bool, limit: int, threads: int) -> Step | None:
    """``one_step`` in a new process."""
    return in_new_process(one_step, network, batch_size, eager, limit, threads)


@click.command()
@click.option("--network", default="preresnet1001", show_default=True, help="Of CIFAR's, by name.")
@click.option("--batch-size", type=click.IntRange(min=_SMALLER), default=128, show_default=True)
@click.option("--limit", type=float, default=24.0, show_default=True, help="GiB a process may map.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV file.  [benchmarks/results]",
)  # fmt: skip
def memory(network: str, batch_size: int, limit: float, threads: int, output: Path) -> None:
    """One training step fused and in eager PyTorch, each in a process of its own.

    The address space of each process is limited: more ends that process's step, not the machine. A
    step that does not fit is measured at a quarter of the batch and scaled, which the table says.
    Needs Linux: resident bytes are read from /proc.
    """
    if not hasattr(models, network):
        raise click.UsageError(f"--network {network}: preact.models has none of that name")
    table = Table(title=f"{network}, one training step, float32", title_justify="left")
    for heading in ("provider", "batch", "peak RSS GiB", "saved GiB", "loss", "s", "measured at"):
        table.add_column(heading)
    records: list[dict[str, Value]] = []
    for provider in ("preact", "eager"):
        size = batch_size
        step = measured(network, size, provider == "eager", int(limit * GIB), threads)
        if step is None:
            size = batch_size // _SMALLER
            step = measured(network, size, provider == "eager", int(limit * GIB), threads)
        if step is None:
            raise click.ClickException(f"{provider}: {limit:g} GiB are few for a batch of {size}")
        peak, saved = step.scaled(batch_size)
        fitted = step.batch_size == batch_size
        note = "this batch" if fitted else f"batch {size}, scaled; {batch_size} exceeds {limit:g}"
        table.add_row(
            provider, str(batch_size), f"{peak / GIB:.2f}", f"{saved / GIB:.2f}",
            f"{step.loss:.6f}", f"{step.seconds:.1f}", note,
        )  # fmt: skip
        records.append(
            {
                "network": network, "provider": provider, "for_batch_size": batch_size,
                "limit_gib": limit, "fits": int(fitted), "peak_rss_gib": peak / GIB,
                "saved_gib": saved / GIB, "threads": threads,
                **{f"measured_{key}": value for key, value in asdict(step).items()},
            }
        )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"memory_{network}.csv"
    write_records(path, records)
    console = wide_console()
    console.print(table)
    console.print(f"wrote {path}", soft_wrap=True)
