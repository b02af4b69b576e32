"""Second stage of every reduction: partial results of tiles merged in a fixed order, no atomics.

A level merges up to ``TILES`` partial results into one; levels follow until one is left, three
at most for 2**31 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = 128
_BLOCK_MOMENTS = 16
_BLOCK_SUMS = 64


@triton.jit
def merge_moments_kernel(
    partial_ptr,  # [tiles, 2, channels]: mean and M2 of each tile's rows
    mean_ptr,  # [programs, channels] with rows of merged_stride, as the next
    spread_ptr,  # M2, or where LAST the variance
    origin_ptr,  # [channels] with origin_stride: what the tiles' means are relative to
    origin_stride,
    merged_stride,
    tiles,
    channels,
    rows,  # over all tiles
    rows_per_tile,  # the last tile may hold fewer
    HAS_ORIGIN: tl.constexpr,
    LAST: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * TILES
    tile = first + tl.arange(0, TILES)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (tile < tiles)[:, None] & (channel < channels)[None, :]
    offsets = tile.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
    mean = tl.load(partial_ptr + offsets, mask, other=0.0)  # [TILES, BLOCK_C]
    m2 = tl.load(partial_ptr + offsets + channels, mask, other=0.0)
    before = tile.to(tl.int64) * rows_per_tile
    count = tl.maximum(tl.minimum(rows - before, rows_per_tile), 0).to(tl.float32)
    total = tl.sum(count, 0)
    share = count / total
    # Summed as distances from the first tile's mean: a mean far from zero leaves no rounding in the
    # sum, and a constant channel no variance.
    shift = tl.load(
        partial_ptr + first.to(tl.int64) * (2 * channels) + channel, channel < channels, other=0.0
    )
    distance = tl.where(mask, mean - shift[None, :], 0.0)  # [TILES, BLOCK_C]
    merged = shift + tl.sum(distance * share[:, None], 0)
    deviation = tl.where(mask, mean - merged[None, :], 0.0)
    spread = tl.sum(m2 + deviation * deviation * count[:, None], 0)
    if LAST:
        spread = spread / total
        if HAS_ORIGIN:
            offset = channel.to(tl.int64) * origin_stride
            merged += tl.load(origin_ptr + offset, channel < channels, other=0.0).to(tl.float32)
    out = tl.program_id(0).to(tl.int64) * merged_stride + channel
    tl.store(mean_ptr + out, merged, channel < channels)
    tl.store(spread_ptr + out, spread, channel < channels)


@triton.jit
def merge_sums_kernel(
    partial_ptr,  # [tiles, size]
    first_ptr,  # [programs, split]: sums of the columns before split, in any floating type
    second_ptr,  # [programs, size - split]: the others'
    merged_stride,
    tiles,
    size,
    split,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    index = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (tile < tiles)[:, None] & (index < size)[None, :]
    values = tl.load(partial_ptr + tile.to(tl.int64)[:, None] * size + index[None, :], mask, 0.0)
    merged = tl.sum(values, 0).to(first_ptr.dtype.element_ty)
    program = tl.program_id(0).to(tl.int64)
    tl.store(first_ptr + program * merged_stride + index, merged, index < split)
    after = index - split
    mask = (index >= split) & (index < size)
    tl.store(second_ptr + program * merged_stride + after, merged, mask)


def merge_moments(
    partial: Tensor, rows: int, rows_per_tile: int, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` from ``[tiles, 2, C]``, each tile of ``rows_per_tile``.

    The tiles' means are relative to ``origin`` ``[C]`` where it is given: those of values far from
    zero keep their digits that way.
    """
    origin_stride = 0 if origin is None else origin.stride(0)
    while True:
        tiles, _, channels = partial.shape
        programs = triton.cdiv(tiles, TILES)
        last = programs == 1
        merged = partial.new_empty(programs, 2, channels) if not last else None
        mean, spread = (
            (partial.new_empty(channels), partial.new_empty(channels))
            if merged is None
            else (merged, merged[:, 1])
        )
        grid = (programs, triton.cdiv(channels, _BLOCK_MOMENTS))
        merge_moments_kernel[grid](
            partial, mean, spread, origin, origin_stride, 2 * channels, tiles, channels, rows,
            rows_per_tile, HAS_ORIGIN=origin is not None, LAST=last,
            TILES=min(TILES, triton.next_power_of_2(tiles)), BLOCK_C=_BLOCK_MOMENTS,
        )  # fmt: skip
        if merged is None:
            return mean, spread
        partial, rows_per_tile = merged, rows_per_tile * TILES


def merge_sums(partial: Tensor, split: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Column sums of ``[tiles, size]``: those before ``split`` and the others, in ``dtype``."""
    while True:
        tiles, size = partial.shape
        programs = triton.cdiv(tiles, TILES)
        last = programs == 1
        merged = partial.new_empty(programs, size) if not last else None
        first, second = (
            (partial.new_empty(split, dtype=dtype), partial.new_empty(size - split, dtype=dtype))
            if merged is None
            else (merged, merged[:, split:])
        )
        grid = (programs, triton.cdiv(size, _BLOCK_SUMS))
        merge_sums_kernel[grid](
            partial, first, second, size, tiles, size, split,
            TILES=min(TILES, triton.next_power_of_2(tiles)), BLOCK=_BLOCK_SUMS,
        )  # fmt: skip
        if merged is None:
            return first, second
        partial = merged
