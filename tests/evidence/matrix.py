"""Every kernel and every shipped configuration for every architecture, as one table.

    python -m tests.evidence.matrix [FILE [ARCHITECTURE...]]

compiles them all, checks each and writes a line for each; some twenty minutes of one processor.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import calls
from .binaries import ARCHITECTURES, Binary, assert_sound, assert_widest, compile_launch
from .launches import Launch, record
from .limits import limits

HALF = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One call with one architecture."""

    arch: int
    op: str
    of: calls.Convolution | bool
    """The convolution, or whether a streaming op's maps are channels_last."""
    dtype: torch.dtype
    precision: str = "tf32"

    def launches(self) -> list[Launch]:
        """One for each kernel and configuration."""
        if isinstance(self.of, bool):
            found = calls.streaming(calls.SHAPE, self.dtype, self.of)
        else:
            found = calls.convolution(self.of, self.dtype)
        with calls.launched_for(self.arch, self.precision):
            return record(found[self.op], every_configuration=True)


def every_case(architectures: Sequence[int] = ARCHITECTURES) -> Iterator[Case]:
    convolutions = [
        *itertools.product(calls.ALL_CONVOLUTIONS, [torch.bfloat16, torch.float32], ["tf32"]),
        *itertools.product(calls.WIDE, [torch.float16], ["tf32"]),
        *itertools.product(calls.WIDE, [torch.float32], ["ieee"]),
    ]
    for arch in architectures:
        for dtype, layout in itertools.product((torch.float32, *HALF), (True, False)):
            for op in calls.streaming(calls.SHAPE, dtype, layout):
                yield Case(arch, op, layout, dtype)
        for case, dtype, precision in convolutions:
            for op in calls.convolution(case, dtype):
                yield Case(arch, op, case, dtype, precision)


def check(case: Case, launch: Launch) -> Binary:
    """Compiled, with everything that must hold of it."""
    binary = compile_launch(launch, case.arch)
    assert_sound(binary, launch)
    if "BLOCK_R" in launch.bound():
        assert_widest(binary, launch, 16)
    if "BLOCK_M" in launch.bound() and case.precision != "ieee":
        assert binary.main_loop.tensor_core, "the main loop multiplies without tensor cores"
    return binary


def row(case: Case, launch: Launch, binary: Binary, default: bool = True) -> dict[str, object]:
    """``default``: whether the launcher takes this configuration where nothing is measured."""
    bound = launch.bound()
    blocks = "x".join(str(v) for k, v in bound.items() if k.startswith(("BLOCK", "TILES")))
    maps = case.of
    if isinstance(maps, bool):
        maps = "channels_last" if maps else "contiguous"
    is_product = "BLOCK_M" in bound and case.precision != "ieee"
    loop = binary.main_loop if is_product else None
    line: dict[str, object] = {
        "arch": case.arch,
        "kernel": binary.name.removesuffix("_kernel"),
        "maps": maps,
        "dtype": str(case.dtype).removeprefix("torch."),
        "product": case.precision if "BLOCK_M" in bound and not is_product else "",
        "default": "yes" if default else "",
        "at_steps": "yes" if bound.get("AT_STEPS") else "",
        "block": blocks,
        "warps": binary.num_warps,
        "stages": launch.options().get("num_stages", ""),
        "registers": binary.registers,
        "local_bytes": binary.stack,
        "shared_bytes": binary.shared,
        "loop_instructions": len(loop.instructions) if loop else "",
        "forming_instructions": _forming(binary, bound) if loop else "",
        "loop_tensor_core": loop.tensor_core if loop else "",
        "loop_products": _products(binary.name, bound) if loop else "",
        "instructions_per_tensor_core": f"{loop.per_tensor_core:.1f}" if loop else "",
        "loop_shared_bytes": loop.shared_bytes(binary.num_warps) if loop else "",
        "tensor_core_instruction": _names(loop.tensor_core_names) if loop else "",
        "accesses": " ".join(
            f"{kind}.{8 * width}:{n}" for (kind, width), n in sorted(binary.global_accesses.items())
        ),
    }  # fmt: skip
    found = limits(line) if loop else None
    line["matrix_clocks"] = f"{found.matrix:.0f}" if found else ""
    line["shared_clocks"] = f"{found.shared:.0f}" if found else ""
    line["issue_clocks"] = f"{found.issue:.0f}" if found else ""
    line["memory_clocks"] = f"{found.memory:.0f}" if found else ""
    line["limit"] = found.by if found else ""
    return line


def _products(kernel: str, bound: dict[str, Any]) -> int:
    """Of one step of the main loop, each once: warps that share a tile may multiply it again."""
    tile = bound["BLOCK_M"] * bound["BLOCK_N"] * bound["BLOCK_K"]
    if "_pairs_" in kernel or "_strided_" in kernel:
        return tile * 9 // 4
    by_rows = "_rows_" in kernel
    return int(tile * (3 if by_rows else 1) * bound.get("KERNEL_ROWS", 1))


def _forming(binary: Binary, bound: dict[str, Any]) -> str:
    """Instructions, for each step of the main loop, of the loop that forms a pending gradient."""
    if not bound.get("PENDING"):
        return ""
    loops = [
        (sum(i.name.startswith("STG") for i in loop.instructions), len(loop.instructions))
        for loop in binary.loops
        if not loop.tensor_core
    ]
    # The compiler may unroll it: as many blocks to a turn as its stores say, of 16 bytes each.
    size = bound["FORM_M"] * bound["FORM_K"] * bound["grad_ptr"].element_size()
    block = max(size // (16 * 32 * binary.num_warps), 1)
    found = [count * block / stores for stores, count in loops if stores]
    assert found, f"no loop of {binary.name} stores a map"
    by_rows = "_rows_" in binary.name
    turns = steps = 0.0
    for residue in itertools.product(range(bound["stride_h"]), range(bound["stride_w"])):
        high, wide = (
            _shifts(*(bound[f"{of}_{axis}"] for of in ("stride", "padding", "dilation", "period")),
                    bound[f"KERNEL_{axis.upper()}"], first)
            for axis, first in zip("hw", residue, strict=True)
        )  # fmt: skip
        if not high or not wide:
            continue
        shifts = {h * bound["out_width"] + (0 if by_rows else w) for h in high for w in wide}
        reach = bound["BLOCK_M"] + max(shifts | {0}) - min(shifts | {0})
        share = 1.0
        if bound["AT_STEPS"]:
            # The first column of tiles of the first class alone stores, and what is its own.
            reach = bound["BLOCK_M"] - (2 * bound["dilation_w"] if by_rows else 0)
            share = 0.0 if any(residue) else 1 / -(-bound["group_in"] // bound["BLOCK_N"])
        turns += share * -(-reach // bound["FORM_M"]) * -(-bound["group_out"] // bound["FORM_K"])
        taps = len(high) * (1 if by_rows else len(wide)) // bound["KERNEL_ROWS"]
        steps += taps * -(-bound["group_out"] // bound["BLOCK_K"])
    return f"{min(found) * turns / steps:.1f}"


def _shifts(
    stride: int, padding: int, dilation: int, period: int, kernel: int, residue: int
) -> list[int]:
    """How far from a pixel of that residue the gradients lie that its taps reach."""
    return [
        (residue + padding - tap * dilation) // stride
        for tap in range(kernel)
        if (residue + padding - tap * dilation) % stride == 0
    ]


def _names(names: set[str]) -> str:
    return " ".join(sorted(names))


def _source(launch: Launch) -> str:
    """What one binary is made of, for the merging kernels, which many ops share."""
    types = [(k, getattr(v, "dtype", v)) for k, v in launch.bound().items() if k[-4:] == "_ptr"]
    blocks = [(k, v) for k, v in launch.bound().items() if k.isupper()]
    return f"{launch.name} {types} {blocks} {launch.options()}"


def main(file: str, architectures: Sequence[int] = ARCHITECTURES) -> int:
    """Writes the table; the number of cases that failed a check."""
    failed = 0
    done: set[str] = set()
    merging: set[tuple[int, str]] = set()
    with Path(file).open("w", newline="", encoding="utf-8") as stream:
        writer = None
        for case in every_case(architectures):
            launches = case.launches()
            default = [x for x in launches if not x.name.startswith("merge")][-1]
            for launch in launches:
                source = (case.arch, _source(launch))
                if launch.name.startswith("merge") and source in merging:
                    continue
                merging.add(source)
                try:
                    binary = check(case, launch)
                except AssertionError as error:
                    failed += 1
                    print(f"{case}: {error}", flush=True)
                    binary = compile_launch(launch, case.arch)
                line = row(case, launch, binary, launch is default)
                if str(line) in done:
                    continue
                done.add(str(line))
                if writer is None:
                    writer = csv.DictWriter(stream, list(line), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)
                stream.flush()
    print(f"{len(done)} binaries, {failed} failed a check")
    return failed


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/binaries.csv"
    sys.exit(bool(main(named, tuple(map(int, sys.argv[2:])) or ARCHITECTURES)))
