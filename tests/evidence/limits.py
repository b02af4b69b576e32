"""Which part of a processor limits a convolution's main loop, by counting what it issues.

A multiprocessor has four parts, each of which issues one instruction a clock and has a matrix unit
of its own. A warp's instruction on that unit occupies it for as many clocks as its products take at
the architecture's peak rate, so a loop may issue as many others in that time before issuing, and
not multiplying, is what it waits for:

=============================== =============================== ====================
instruction                     products                        clocks of one part
=============================== =============================== ====================
HMMA 16x8x16 (TF32: 16x8x8)     2048 (1024), by a warp          8 on sm_80, 16 on
                                                                sm_86, 89 and 120, 4
                                                                on sm_90 and 100
HGMMA 64xNx16 (TF32: 64xNx8)    1024 N (512 N), by four warps   N / 2 on sm_90
UTCHMMA MxNx16 (TF32: MxNx8)    16 M N (8 M N), by a block      M N / 256 on sm_100
=============================== =============================== ====================

The third limit is memory: the bytes of the layer's maps and weights, each once, at the bandwidth of
the architecture's fastest memory. Where moving them takes longer than multiplying, as with few
channels, the instructions have that time too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from preact import costs

from .calls import Convolution, parsed

PRODUCTS = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 120: 512}
"""Products of half types, added in float32, of a multiprocessor in a clock; half as many of TF32.

From the makers' data sheets, of the architecture's fastest device: GeForce ones of sm_86, 89 and
120 have half that rate, so that their matrix units limit a loop sooner.
"""
_PARTS = 4
_HALF_RATE = (86, 89, 120)
"""Architectures whose device in ``costs.GPUS`` adds in float32 at half that rate."""


class Limits(NamedTuple):
    """Clocks of one part of a multiprocessor for one step of the main loop of one block."""

    matrix: float
    issue: float
    memory: float

    @property
    def by(self) -> str:
        """What takes longest. A tie is not the instructions'."""
        if self.issue > max(self.matrix, self.memory):
            return "issue"
        return "matrix" if self.matrix >= self.memory else "memory"


def products_of(instruction: str, block_m: int, block_n: int, warps: int, tf32: bool) -> int:
    """Products of one matrix instruction of the listing, by all the block's warps that issue it."""
    depth = 8 if tf32 else 16
    if instruction.startswith("HMMA"):
        return 16 * 8 * depth * warps
    if instruction.startswith("HGMMA"):
        shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction)
        assert shape, instruction
        assert int(shape.group(2)) == depth, instruction
        return 64 * int(shape.group(1)) * depth * (warps // 4)
    if instruction.startswith("UTCHMMA"):
        # One of 64 rows takes as long as one of 128: half of the unit idles.
        return 128 * block_n * depth
    raise AssertionError(f"a matrix instruction of unknown size: {instruction}")


def layer_costs(kernel: str, case: Convolution, itemsize: int) -> tuple[int, int]:
    """Bytes and products of one call at the layer ``case``, by the cost model's kernels."""
    shape = (case.channels, 28, 28)
    weight = (case.out_channels, case.channels, case.kernel, case.kernel)
    layer = costs.layer((32, *shape), weight, padding=(case.kernel // 2,) * 2)
    if "backward" not in kernel:
        (own,) = costs.own_forward(layer, adds=True)
    else:
        of_input, of_weight = costs.own_backward(layer, pending=True, leaves=True)
        own = of_weight if "weight" in kernel else of_input
    return own.bytes(itemsize), own.products


def limits(row: Mapping[str, object]) -> Limits:
    """Of one line of the table, of a kernel that multiplies on matrix units."""
    arch, warps = int(str(row["arch"])), int(str(row["warps"]))
    kernel, dtype, names = (
        str(row[name]) for name in ("kernel", "dtype", "tensor_core_instruction")
    )
    tf32 = dtype == "float32"
    block_m, block_n, _ = map(int, str(row["block"]).split("x"))
    each = {products_of(name, block_m, block_n, warps, tf32) for name in names.split()}
    assert len(each) == 1, f"instructions of several sizes in one loop: {names}"
    multiplied = int(str(row["loop_tensor_core"])) * each.pop()
    rate = PRODUCTS[arch] // (2 if tf32 else 1)
    gpu = costs.nearest_gpu(arch)
    moved, products = layer_costs(kernel, parsed(str(row["maps"])), 4 if tf32 else 2)
    # Clocks a second of all multiprocessors together, from the device's own rate.
    own_rate = rate // 2 if arch in _HALF_RATE else rate
    clocks = (gpu.tf32 if tf32 else gpu.half) / 2 / own_rate
    return Limits(
        matrix=multiplied / rate,
        issue=int(str(row["loop_instructions"])) * warps / _PARTS,
        memory=int(str(row["loop_products"])) / products * moved / gpu.bandwidth * clocks,
    )
