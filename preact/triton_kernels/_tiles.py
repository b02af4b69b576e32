"""Tiles worth trying for each convolution, the one to take where nothing is measured first.

Chosen by counting, as ``benchmarks/LIMITS.md`` shows it: of tiles that spill no register, the one
whose step multiplies or waits for memory for longer than it issues, or comes closest to it.
"""

from __future__ import annotations

import torch
import triton

from ._prologue import Config, Sizes

WARP_GROUP = (90, 100, 103)
"""Compute capabilities whose matrix instructions take operands from shared memory."""

TENSOR_MEMORY = (100, 103)
"""Compute capabilities whose matrix instructions leave the result in memory of its own."""

LITTLE_SHARED = (86, 89, 120, 121)
"""Compute capabilities with 99 KiB of shared memory for a block: no room for a third stage."""

LONG_SUM = 512
"""Products of one result from which it takes longer to multiply than its maps to move."""

MOST_ROWS_AT_ONCE = 3
"""Rows of a kernel that one step takes: each has buffers in shared memory of its own."""


def tile_size(extent: int, most: int) -> int:
    """The power of two that covers ``extent``, from ``tl.dot``'s least size to ``most``."""
    return min(max(triton.next_power_of_2(extent), 16), most)


def fills(extent: int, tile: int) -> bool:
    """Whether tiles of that size have at most an eighth of idle elements."""
    return 8 * (triton.cdiv(extent, tile) * tile - extent) <= extent


def product_configs(
    columns: int,
    inner: int,
    taps: int,
    kernel_rows: int,
    dtype: torch.dtype,
    precision: str,
    capability: int,
    gradient: bool = False,
) -> tuple[Config, ...]:
    """For forward and dgrad.

    ``columns`` and ``inner`` are channels of a group: of the result, of the sum, which runs over
    ``taps`` as well; ``kernel_rows`` is 0 where a tile cannot serve the taps of a row. A
    ``gradient``'s tiles are multiplied as they are loaded, an activation's pass through registers.
    """
    block_n, block_k = tile_size(columns, 128), tile_size(inner, 64)
    if dtype == torch.float32:
        block_n, block_k = min(block_n, 64), min(block_k, 32)
        if precision == "ieee":
            # ptxas spills 8 bytes of 64 rows on some architectures, in backward of 32.
            rows = 64 if gradient or capability in WARP_GROUP else 32
            return (Config(rows, min(block_n, 32), 16, 4, 2),)
    if capability in TENSOR_MEMORY:
        each_tap = _tensor_memory_each_tap(block_n, block_k, dtype, gradient)
        by_row = _tensor_memory_by_row(columns, block_n, block_k, dtype, gradient)
    else:
        each_tap = _each_tap(block_n, block_k, dtype, capability, gradient)
        at_once = kernel_rows if kernel_rows <= MOST_ROWS_AT_ONCE else 1
        by_row = _by_row(block_n, block_k, at_once, dtype, capability, gradient)
    if kernel_rows:
        return (by_row, *each_tap)
    if inner * taps >= LONG_SUM and inner >= 64 and capability not in LITTLE_SHARED:
        return (*_widest(columns, inner, dtype, capability, gradient), *each_tap)
    return each_tap


def _widest(
    columns: int, inner: int, dtype: torch.dtype, capability: int, gradient: bool
) -> tuple[Config, ...]:
    """For a long sum: most products for each element that a step normalises, or that programs
    beside each other form again."""
    tensor_memory, groups = capability in TENSOR_MEMORY, capability in WARP_GROUP
    if gradient:
        return (Config(64, 256, 128 // dtype.itemsize, 8, 3),) if columns % 256 == 0 else ()
    if columns % 128:
        return ()
    if dtype == torch.float32:
        return (Config(128, 128, 64, 8, 2) if groups else Config(128, 128, 32, 8, 3),)
    block_k = tile_size(inner, 128)
    if columns % 256 == 0:
        return (Config(128, 256, block_k, 8, 2) if tensor_memory else Config(128, 256, 64, 8, 3),)
    return (Config(256 if tensor_memory else 128, 128, block_k, 8, 2),) if groups else ()


def _each_tap(
    block_n: int, block_k: int, dtype: torch.dtype, capability: int, gradient: bool
) -> tuple[Config, ...]:
    stages = 2 if capability in LITTLE_SHARED else 3
    groups = capability in WARP_GROUP
    rows, warps = 128, 4 if block_n <= 32 else 8
    if groups and not gradient and block_k <= 32 and block_n <= 64:
        # Elements enough for each thread that what a step takes besides is little of it.
        rows, warps = 256 if block_n * block_k <= 512 else 128, 4
    larger = Config(rows, block_n, block_k, warps, stages)
    smaller = Config(64, block_n, block_k, 4 if block_n <= 64 or groups else 8, stages)
    if block_n > 64 and (capability in LITTLE_SHARED or (gradient and groups)):
        # ptxas spills some bytes of the wide tile with many rows, and on sm_120 with few warps.
        return (
            Config(64, block_n, block_k, 4 if groups else 8, stages),
            Config(128, 64, block_k, 8, stages),
        )
    few = gradient and block_n <= 16
    if dtype == torch.float32 and (capability in (86, 89) or (capability in LITTLE_SHARED and few)):
        return (smaller,)  # 8 bytes of the larger tile are spilled there
    return (larger, smaller)


def _by_row(
    block_n: int,
    block_k: int,
    kernel_rows: int,
    dtype: torch.dtype,
    capability: int,
    gradient: bool,
) -> Config:
    """Three accumulators want the large tile of a warp-group's instructions, whose operands need no
    registers of all warps; elsewhere a smaller one keeps them from spilling."""
    narrow, block_k = min(block_n, 64), min(block_k, 32)
    # Few columns pay for little of the norm: a step takes all rows of the kernel with one.
    few = narrow <= 32 and not gradient and dtype != torch.float32
    if capability in WARP_GROUP:
        most = 64 // dtype.itemsize if gradient else 64
        return Config(256 if few else 128, narrow, min(block_k, most), 8, 2, 3, kernel_rows)
    # Eight warps would multiply a tile of 64 rows twice.
    return Config(64, narrow, block_k, 4, 3, 3, kernel_rows if few else 1)


def _tensor_memory_each_tap(
    block_n: int, block_k: int, dtype: torch.dtype, gradient: bool
) -> tuple[Config, ...]:
    """As few warps, each with as many elements of the prologue, as their registers allow: what a
    step takes besides, every warp issues. What backward ends with takes the most registers."""
    single = dtype == torch.float32
    threads = 256 if block_n > 64 and gradient else 128
    elements = 128 // dtype.itemsize * threads
    few = block_n <= (32 if gradient or single else 64)
    if gradient and few:
        block_k = min(block_k, 32)
    rows = 256 if few and 256 * block_k <= elements else 128
    larger = Config(rows, block_n, min(block_k, elements // rows), threads // 32, 3)
    if gradient and single and 16 in (block_n, block_k):
        return (larger,)  # 8 bytes of the smaller tile are spilled
    warps = 4 if gradient and block_n <= 64 else 8
    return (larger, Config(64, block_n, larger.block_k, warps, 3))


def _tensor_memory_by_row(
    columns: int, block_n: int, block_k: int, dtype: torch.dtype, gradient: bool
) -> Config:
    if not gradient and block_n <= 32:
        # ptxas spills 8 bytes of 256 rows of 16 channels in float32.
        rows = 128 if dtype == torch.float32 and block_k < 32 else 256
        return Config(rows, block_n, min(block_k, 32), 4, 2, row_taps=3)
    if dtype == torch.float32 and columns % 128 == 0:
        rows, block_n = (256, 64) if gradient else (128, 128)
        return Config(rows, block_n, block_k, 8, 2, row_taps=3)
    elements = (32 if gradient else 64) * 2 // dtype.itemsize
    # ptxas spills 80 bytes of four warps where a tile has idle columns.
    idle = dtype == torch.float32 and columns % block_n
    warps = 8 if block_n > 64 or (block_n == 64 and (gradient or idle)) else 4
    rows = 256 if block_n <= 32 and 256 * block_k <= elements * 32 * warps else 128
    block_k = min(block_k, elements * 32 * warps // rows)
    if block_n > 64 and gradient:
        block_k = min(block_k, 32)  # ptxas spills 32 bytes of twice that, or 40
    return Config(rows, block_n, block_k, warps, 2, row_taps=3)


def weight_configs(
    sizes: Sizes,
    stride: int,
    by_rows: bool,
    by_pairs: bool,
    dtype: torch.dtype,
    precision: str,
    capability: int,
) -> tuple[Config, ...]:
    """For wgrad; ``block_k`` counts rows of the sum."""
    block_m, block_n = tile_size(sizes.group_out, 128), tile_size(sizes.group_in, 128)
    block_k, single = 64, dtype == torch.float32
    if single:
        block_m, block_n, block_k = min(block_m, 64), min(block_n, 64), 32
        if precision == "ieee":
            return (Config(min(block_m, 32), min(block_n, 32), 16, 4, 2),)
    each_tap = _weight_each_tap(block_m, block_n, block_k, capability)
    widest = _widest_weight(sizes, dtype, capability)
    if by_pairs and stride == 2:
        strided = _strided(block_m, block_n, block_k // 2, dtype, capability)
        # In float32 what is transposed moves by the element, and by pairs it is more of it.
        by_element = single and capability not in TENSOR_MEMORY
        if by_element and (capability not in WARP_GROUP or fills(sizes.group_out, 256)):
            return (*widest, strided, *each_tap)
        return (strided, *each_tap)
    if not by_rows:
        return (*widest, *each_tap)
    if capability in LITTLE_SHARED:
        block_m = min(block_m, 64)
    # Pairs have four times as many rows of what is transposed: where operands are registers, 32
    # rows as they are issue half as much with 64 columns.
    own_rows = block_m == 32 and block_n == 64 and single and capability not in WARP_GROUP
    if block_m <= 32 and by_pairs and not own_rows:
        return (_by_pairs(block_m, block_n, block_k, dtype, capability), *each_tap)
    if capability in WARP_GROUP:
        # A warp group multiplies 64 rows: a second one would share its columns, not its overhead.
        # Where the result lies in tensor memory, one group has registers enough for twice the tile.
        result, columns = 64 * 64, min(block_n, 64)
        if capability in TENSOR_MEMORY:
            result, columns = 128 * 64, block_n
        warps = 4 if columns >= 64 and block_m * columns <= result else 8
        return (Config(block_m, columns, block_k, warps, 2, row_taps=3), *each_tap)
    # ptxas spills up to 16 bytes of more rows of the sum with 16 columns.
    few = (single and not own_rows) or (block_m >= 64 and block_n == 16)
    block_k = 16 if few else 32
    # Eight warps would multiply a tile of 64 rows twice.
    return (Config(min(block_m, 64), min(block_n, 64), block_k, 4, 2, row_taps=3), *each_tap)


def _weight_each_tap(
    block_m: int, block_n: int, block_k: int, capability: int
) -> tuple[Config, ...]:
    stages = 3
    if capability in LITTLE_SHARED:
        # ptxas spills some bytes of 128 columns with 64 rows of the sum.
        block_m, stages, block_k = min(block_m, 64), 2, min(block_k, 4096 // block_n)
    warps = 4 if block_m * block_n <= 4096 else 8
    larger = Config(block_m, block_n, block_k, warps, stages)
    return larger, Config(min(block_m, 64), min(block_n, 64), block_k, 4, stages)


def _widest_weight(sizes: Sizes, dtype: torch.dtype, capability: int) -> tuple[Config, ...]:
    """Where results of 256 channels, or in float32 of 128, fill a tile."""
    outs, ins = sizes.group_out, sizes.group_in
    if capability in LITTLE_SHARED or not fills(outs, 128):
        return ()
    tensor_memory, groups = capability in TENSOR_MEMORY, capability in WARP_GROUP
    if groups and fills(outs, 256) and fills(ins, 128):
        block_k = (64 if tensor_memory else 32) * 4 // dtype.itemsize
        return (Config(256, 128, block_k, 8, 2),)
    if dtype != torch.float32 or not fills(ins, 64):
        return ()
    if groups and fills(ins, 256):
        return (Config(128, 256, 32, 8, 3),)
    return (Config(128, 128 if fills(ins, 128) else 64, 32, 8, 3),)


def _by_pairs(
    block_m: int, block_n: int, block_k: int, dtype: torch.dtype, capability: int
) -> Config:
    """Warps share 64 or 128 rows, where with one pixel's they would multiply the same."""
    single = dtype == torch.float32
    columns = 2 * min(block_n, 32)
    warps = 4 if block_m * columns <= 1024 or capability in TENSOR_MEMORY else 8
    if block_n >= 64 and (capability in TENSOR_MEMORY or (capability in WARP_GROUP and single)):
        # Twice the columns for the same gradient.
        columns = 128
        warps = 4 if single and capability in TENSOR_MEMORY else 8
    stages = 2
    if capability in LITTLE_SHARED and single:
        # ptxas spills 8 bytes of four warps on some architectures, of the smallest tile with two
        # stages; eight would multiply that twice.
        warps, stages = (8, 2) if block_m > 16 else (4, 3)
    # Operands in registers want fewer rows of the sum, what a step takes besides wants more.
    pairs = 64 if capability in WARP_GROUP else 512 // block_m
    if capability in TENSOR_MEMORY:
        pairs = 2048 // block_m
    pairs = max(pairs * block_k // 64, 16)
    return Config(4 * block_m, columns, pairs, warps, stages, pixels=2)


def _strided(
    block_m: int, block_n: int, block_k: int, dtype: torch.dtype, capability: int
) -> Config:
    """Three accumulators of as many channels as fit where the results lie."""
    rows, columns = 2 * min(block_m, 64), 2 * min(block_n, 64)
    if capability in WARP_GROUP:
        tensor_memory = capability in TENSOR_MEMORY
        # ptxas spills some bytes of the largest tile with twice the sum's rows.
        largest = rows * columns == 128 * 128
        if largest and (dtype == torch.float32 or not tensor_memory):
            return Config(rows, columns, block_k, 4 if tensor_memory else 8, 2, pixels=2)
        few = tensor_memory or rows * columns <= 64 * 32
        return Config(rows, columns, 2 * block_k, 4 if few else 8, 2, pixels=2)
    # ptxas spills 8 bytes of more rows of the sum on sm_120.
    block_k = 16 if capability in LITTLE_SHARED else block_k
    return Config(rows, 2 * min(block_n, 32), block_k, 8 if rows > 64 else 4, 2, pixels=2)
