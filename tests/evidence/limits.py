"""What limits a convolution's main loop, by counting: multiplying, issuing, or moving.

For one step of the main loop of one block, in clocks of a multiprocessor:

matrix
    Every product once, at the peak rate of the matrix units; on sm_100 an instruction of 64 rows
    takes as long as one of 128.
issue
    Instructions of the loop's machine code, of all warps: each of four parts issues one a clock.
    Instructions that one thread alone issues count for every warp, as its part waits for them. A
    pending gradient that is stored goes through a loop of its own, whose share is in it.
shared
    Bytes that the loop writes to shared memory and reads from there, and the operands that a matrix
    instruction reads itself, at 128 bytes a clock.
memory
    The layer's maps and weights, each once, by the cost model's kernels, at the bandwidth of the
    architecture's fastest memory: the step's share of them, by its products.

A layer with few channels moves more than it multiplies: whoever waits for memory has that time to
issue. So a loop is limited by issuing only where that takes longer than any of the others.

Sources of the rates, by the names of the documents:

- matrix: NVIDIA's white papers on A100, GA102, H100 and RTX Blackwell and the data sheet of B200:
  dense products of half types added in float32, over multiprocessors and boost clock.
- an instruction of 64 rows on sm_100, and operands from shared memory there: SemiAnalysis,
  microbench-blackwell, umma_throughput, measured on a B200: N / 2 clocks for 128 x N x 16, at most
  half of the peak with 64 rows, and 32 + N / 4 for narrow N with both operands from shared memory,
  which is 128 bytes a clock.
- issue and shared memory: CUDA C++ Programming Guide, "Compute Capabilities": four warp schedulers,
  one instruction a clock each; 32 banks of 32 bits a clock.
- memory: the data sheets in ``preact.costs.GPUS``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from preact import costs
from preact.triton_kernels import _packed

from .calls import parsed

PRODUCTS = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 120: 512}
"""Products of half types, added in float32, of a multiprocessor in a clock; half as many of TF32.

GeForce devices of sm_86, 89 and 120 have half that rate, so that their matrix units limit a loop
sooner.
"""
_PARTS = 4
_SHARED_BYTES = 128
_HALF_RATE = (86, 89, 120)
"""Architectures whose device in ``costs.GPUS`` adds in float32 at half that rate."""


class Limits(NamedTuple):
    """Clocks of one step of the main loop of one block."""

    matrix: float
    issue: float
    shared: float
    memory: float
    useful: float
    """Of the step's products at the peak rate."""

    @property
    def by(self) -> str:
        """What takes longest. A tie is not the instructions'."""
        others = {"matrix": self.matrix, "shared": self.shared, "memory": self.memory}
        longest = max(others, key=lambda name: others[name])
        return "issue" if self.issue > others[longest] else longest

    @property
    def excess(self) -> float:
        """Issuing, over what takes longest besides."""
        return self.issue / max(self.matrix, self.shared, self.memory)

    @property
    def issued(self) -> float:
        """Issuing, over what takes longer of multiplying and waiting for memory."""
        return self.issue / max(self.matrix, self.memory)

    @property
    def share(self) -> float:
        """Of the peak rate of multiplying, where maps are at hand: what the cost model counts."""
        return self.useful / max(self.matrix, self.issue)


def floor(row: Mapping[str, object]) -> float:
    """Clocks that issuing a step takes at least, by what the prologue's arithmetic is made of.

    Of the packed prologues' assembly, the elements of the tile that is normalised, or formed at
    each step or once for all taps; of every 16 bytes of a tile, one instruction to fetch them and
    one for their address; of what passes through registers, one to read or to store them. Loops,
    masks, barriers and matrix instructions come on top.
    """
    arch, kernel = int(str(row["arch"])), str(row["kernel"])
    block_m, block_n, block_k = map(int, str(row["block"]).split("x"))
    half = str(row["dtype"]) != "float32"
    taps = int(str(row["loop_products"])) / (block_m * block_n * block_k)
    rows = max(taps // 3, 1) if kernel.endswith("_rows") else 1
    paired = arch >= _packed.PAIRED
    # widen, subtract, multiply and add, round with ReLU, and clear what is outside
    each = 2.5 if paired else 4.0
    if "weight" in kernel:
        # A gradient for each tap along the row, or for each of the kernel's rows.
        pairs = kernel.endswith("_pairs")
        prologue, others = block_n * block_k, block_m * block_k * (3 if pairs else taps)
        each -= 0.5 if pairs else 0
        through = 2 * prologue
    elif "input" in kernel:
        case = parsed(str(row["maps"]))
        # widen, subtract, multiply and add twice, round
        each = (3.5 if paired else 5.5) if half else (1.5 if paired else 3.0)
        if row["at_steps"]:
            # and clear; two maps pass through registers
            each += 0.5 if half else 1.0
            prologue = block_m * block_k * rows
            others, through = prologue + block_n * block_k * taps, 2 * prologue
        else:
            steps = case.kernel * (1 if kernel.endswith("_rows") else case.kernel) / rows
            prologue = block_m * block_k * case.stride**2 / steps
            # Two maps of it are read and one stored; then the product takes it as it is.
            others, through = 2 * prologue + block_m * block_k * rows + block_n * block_k * taps, 0
    else:
        prologue, others = block_m * block_k * rows, block_n * block_k * taps
        through = 2 * prologue
    of_16_bytes = 8 if half else 4
    instructions = prologue * each + (2 * (prologue + others) + through) / of_16_bytes
    return instructions / 32 / _PARTS


def layer_costs(kernel: str, maps: str, itemsize: int) -> tuple[int, int]:
    """Bytes and products of one call at the layer ``maps`` names, by the cost model's kernels."""
    case = parsed(maps)
    weight = (case.out_channels, case.channels, case.kernel, case.kernel)
    strides, padding = (case.stride,) * 2, (case.kernel // 2,) * 2
    layer = costs.layer(case.input_shape, weight, strides, padding)
    if "backward" not in kernel:
        (own,) = costs.own_forward(layer, adds=True)
    else:
        of_input, of_weight = costs.own_backward(layer, pending=True, leaves=True)
        own = of_weight if "weight" in kernel else of_input
    return own.bytes(itemsize), own.products


def operand_bytes(instruction: str, block_m: int, block_n: int, itemsize: int) -> int:
    """What one matrix instruction reads from shared memory by itself; the weights at least."""
    depth = 32 // itemsize
    if instruction.startswith("HGMMA"):
        return _columns(instruction) * depth * itemsize
    return block_n * depth * itemsize if instruction.startswith("UTCHMMA") else 0


def _columns(instruction: str) -> int:
    shape = re.match(r"HGMMA\.64x(\d+)x", instruction)
    assert shape, instruction
    return int(shape.group(1))


def limits(row: Mapping[str, object]) -> Limits:
    """Of one line of the table, of a kernel that multiplies on matrix units."""
    arch, warps = int(str(row["arch"])), int(str(row["warps"]))
    kernel, dtype, names = (
        str(row[name]) for name in ("kernel", "dtype", "tensor_core_instruction")
    )
    tf32 = dtype == "float32"
    itemsize = 4 if tf32 else 2
    block_m, block_n, _ = map(int, str(row["block"]).split("x"))
    rate = PRODUCTS[arch] // (2 if tf32 else 1)
    products, matrix_instructions = (
        int(str(row[name])) for name in ("loop_products", "loop_tensor_core")
    )
    matrix = products / rate
    if "UTCHMMA" in names:
        matrix = matrix_instructions * 128 * block_n * (32 // itemsize) / rate
    read = matrix_instructions * max(
        operand_bytes(name, block_m, block_n, itemsize) for name in names.split()
    )
    if names.startswith("HGMMA"):
        read *= warps // 4
    issued = int(str(row["loop_instructions"]))
    forming = float(str(row["forming_instructions"] or 0))
    gpu = costs.nearest_gpu(arch)
    moved, multiplied = layer_costs(kernel, str(row["maps"]), itemsize)
    # Clocks a second of all multiprocessors together, from the device's own rate.
    own_rate = rate // 2 if arch in _HALF_RATE else rate
    clocks = (gpu.tf32 if tf32 else gpu.half) / 2 / own_rate
    return Limits(
        matrix=matrix,
        issue=(issued + forming) * warps / _PARTS,
        shared=(int(str(row["loop_shared_bytes"])) + read) / _SHARED_BYTES,
        memory=products / multiplied * moved / gpu.bandwidth * clocks,
        useful=products / rate,
    )
