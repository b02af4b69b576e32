"""``python -m benchmarks streaming``: the passes of the CPU beside ``copy_`` of the same maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

import preact
from preact import backends

from . import hardware, limits, timing
from .choices import Choices
from .records import Value, write_records
from .report import wide_console
from .workload import DTYPES

__all__ = ["OPS", "map_shape", "measure", "streaming", "vectors", "verdict"]

RESULTS = Path(__file__).parent / "results"
EPS = 1e-5
# Maps that each op reads or writes; a copy moves two.
OPS = {"stats": 1, "apply": 2, "reduce": 2, "apply-backward": 4, "add+stats": 3}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
LEVELS = ("L3", "L2")
AIM = 0.9  # of copy_'s bytes per second
_L2_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def _l2_bytes() -> int:
    """The second-level caches of the cores that PyTorch's threads run on, together."""
    stated = _L2_SIZE.read_text().strip() if _L2_SIZE.exists() else "1024K"
    return int(stated.removesuffix("K")) * 1024 * torch.get_num_threads()


def vectors() -> str:
    """The instruction set of the passes: those that only multiply bfloat16 are not used there."""
    level = backends.cpu_capability()
    return "AVX512" if level in ("AMX", "AVX512_BF16") else level


def map_shape(
    level: str, maps: int, channels: int, size: int, dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Maps of twice the L2 caches each for "L3"; for "L2" all ``maps`` fill half of them.

    More than half does not stay there: pages fall where the system puts them, some sets fill up.
    """
    wanted = 2 * _l2_bytes() if level == "L3" else _l2_bytes() // (2 * max(maps, 2))
    image = channels * size * size * dtype.itemsize
    return max(wanted // image, 1), channels, size, size


def _lanes(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kernels: str
) -> dict[str, Callable[[], None]]:
    """A copy, an op, and its limits with and without lines asked for, on maps of one shape."""
    torch.manual_seed(0)
    x, grad, skip, target = (
        torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(4)
    )
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    norm: tuple[Tensor, ...] = (torch.randn(shape[1]), torch.rand(shape[1]) + 0.5, weight, bias)
    sums = (torch.randn(shape[1]), torch.randn(shape[1]))
    ops, least = backends.table("cpp"), limits.operations(kernels)
    passes: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
        "stats": (ops.batch_norm_stats, least.stats, (x,)),
        "apply": (ops.batch_norm_relu, least.apply, (x, *norm, EPS)),
        "reduce": (ops.batch_norm_relu_backward_reduce, least.reduce, (grad, x, *norm, EPS)),
        "apply-backward": (
            ops.batch_norm_relu_backward_apply, least.backward,
            (grad, x, *norm, *sums, skip, EPS),
        ),
        "add+stats": (ops.identity_add, least.add, (x, skip)),
    }  # fmt: skip
    packets, arguments = passes[op][:2], passes[op][2]
    # An overload is taken once: finding it again is no part of the op.
    run, limit = (packet.default for packet in packets)
    return {
        "copy_": lambda: target.copy_(x),
        "op": lambda: run(*arguments),
        "moves": lambda: limit(*arguments, False, False),
        "moves, lines asked for": lambda: limit(*arguments, True, False),
        "computes": lambda: limit(*arguments, False, True),
        "computes, lines asked for": lambda: limit(*arguments, True, True),
    }


def measure(
    op: str,
    dtype: torch.dtype,
    layout: str,
    level: str,
    channels: int,
    size: int,
    rounds: int,
    kernels: str,
) -> dict[str, Value]:
    """One row: the op's bytes per second over those of ``copy_``, and what a call alone takes.

    ``ratio`` counts each map that an op reads or writes once. ``call_us`` is the same op on a map
    of one pixel: checks, allocation and the way into the op, no streaming. ``moves`` is the ratio
    of a call that only moves the op's bytes (``limits.cpp``), ``computes`` that of one with the
    op's arithmetic as well, each by the faster of its two loops; ``of_computes`` is the latter's
    time over the op's. The names that end in ``_streaming`` leave out what calls cost.
    """
    shape = map_shape(level, OPS[op], channels, size, dtype)
    one_pixel = (1, channels, 1, 1)
    every = [_lanes(op, one, dtype, layout, kernels) for one in (shape, one_pixel)]
    steps = {(lane, i): call for i in range(2) for lane, call in every[i].items()}
    found = timing.measure(steps, "cpu", rounds, 1.0, least_rounds=min(rounds, 5))
    took = {key: timing.quantiles(s.seconds, 0.2, 0.8).median * 1e6 for key, s in found.items()}
    scale = OPS[op] / 2
    row: dict[str, Value] = {
        "op": op,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "level": level,
        "shape": "x".join(map(str, shape)),
        "map_bytes": shape[0] * channels * size * size * dtype.itemsize,
        "maps": OPS[op],
        "us": took["op", 0],
        "copy_us": took["copy_", 0],
        "call_us": took["op", 1],
        "copy_call_us": took["copy_", 1],
    }
    chosen = {"ratio": "op"}
    for limit in ("moves", "computes"):
        lanes = (lane for lane in every[0] if lane.startswith(limit))
        chosen[limit] = min(lanes, key=lambda lane: took[lane, 0])
        row[f"{limit}_us"] = took[chosen[limit], 0]
        row[f"{limit}_call_us"] = took[chosen[limit], 1]
    for name, lane in chosen.items():
        ratio = timing.paired(found["copy_", 0], found[lane, 0])
        row |= {
            f"{name}_q25": scale * ratio.low,
            name: scale * ratio.median,
            f"{name}_q75": scale * ratio.high,
            f"{name}_streaming": scale
            * (took["copy_", 0] - took["copy_", 1])
            / (took[lane, 0] - took[lane, 1]),
        }
    of_computes = timing.paired(found[chosen["computes"], 0], found["op", 0])
    return row | {
        "of_computes_q25": of_computes.low,
        "of_computes": of_computes.median,
        "of_computes_q75": of_computes.high,
        "verdict": verdict(row),
    }


def verdict(row: dict[str, Value]) -> str:
    """What of the aim: "met", "out of reach" of the limit that computes too, or "missed"."""
    if float(row["ratio"]) >= AIM:
        return "met"
    return "missed" if float(row["computes"]) >= AIM else "out of reach"


@click.command()
@click.option("--dtypes", type=Choices(DTYPES), default="all", help="With commas.  [all]")
@click.option("--layouts", type=Choices(LAYOUTS), default="all", help="With commas.  [all]")
@click.option("--levels", type=Choices(LEVELS), default="all", help="With commas.  [all]")
@click.option("--channels", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--size", type=click.IntRange(min=1), default=32, show_default=True, help="Pixels.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    help="Folder for the CSV file.  [benchmarks/results]",
)  # fmt: skip
def streaming(
    dtypes: list[str],
    layouts: list[str],
    levels: list[str],
    channels: int,
    size: int,
    rounds: int,
    output: Path,
) -> None:
    """The CPU's passes against copy_ of the same maps, out of L3 and out of the cores' L2, and
    against what a pass can take at least: the same calls that only move their bytes, and those
    that compute as well, which need a C++ compiler.

    PREACT_CPU_CAPABILITY=avx2 measures the kernels for processors without AVX-512; the CSV is named
    after the instruction set.
    """
    reason = backends.available("cpu")["cpp"]
    if reason:
        raise click.ClickException(f"no native kernels: {reason}")
    kernels = vectors()
    try:
        limits.operations(kernels)
    except (OSError, RuntimeError) as error:
        raise click.ClickException(f"limits.cpp cannot be compiled here: {error}") from error
    preact.retain_freed_memory()
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"streaming_{kernels.lower()}_{channels}x{size}.csv"
    console = wide_console()
    table = Table(
        title=f"bytes per second over copy_'s, {kernels}, {channels} channels of {size} x {size}",
        title_justify="left",
    )
    for heading in (
        "op", "type", "layout", "out of", "map MiB", "us", "copy_ us", "a call us",
        "ratio (IQR)", "moves (IQR)", "computes (IQR)", "without calls", "of computes",
        f"aim {AIM}",
    ):  # fmt: skip
        table.add_column(heading)
    rows: list[dict[str, Value]] = []
    machine = hardware.describe(torch.device("cpu"), "retain")
    for level in levels:
        for dtype in dtypes:
            for layout in layouts:
                for op in OPS:
                    row = measure(
                        op, getattr(torch, dtype), layout, level, channels, size, rounds, kernels
                    )
                    rows.append({**row, "kernels": kernels, **machine})
                    table.add_row(
                        op, dtype, layout, level, f"{float(row['map_bytes']) / 2**20:.2f}",
                        f"{row['us']:.1f}", f"{row['copy_us']:.1f}", f"{row['call_us']:.1f}",
                        *(f"{row[name]:.2f} ({row[name + '_q25']:.2f}-{row[name + '_q75']:.2f})"
                          for name in ("ratio", "moves", "computes")),
                        f"{row['ratio_streaming']:.2f}", f"{row['of_computes']:.2f}",
                        str(row["verdict"]),
                    )  # fmt: skip
                    write_records(path, rows)
    console.print(table)
    counts = Counter(str(row["verdict"]) for row in rows)
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))
    console.print(f"wrote {path}", soft_wrap=True)
