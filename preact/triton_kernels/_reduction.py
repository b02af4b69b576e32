"""How per-channel sums over a map are split between programs, and the statistics of a map.

A program reduces, for one channel (contiguous maps) or one block of channels (channels_last), a run
of rows and writes a partial result; ``_partials`` merges those. Rows are as far apart as
``row_groups`` says: pixels of a channels_last map, images of a contiguous one, lines of a single
image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device as devices
from .. import tuning
from ._maps import Config, Matrix, column_block, matrix, shape_class
from ._partials import merge_moments

CONFIGS = (Config(4096, 4, 4), Config(8192, 8, 2), Config(2048, 4, 8))


class Split(NamedTuple):
    """Numbers of a launch over one map, in the units of the kernels' arguments."""

    rows: int
    row_groups: int
    columns: int
    channel_groups: int
    group: int
    rows_per_split: int
    splits: int
    lanes: int
    """Channels, or blocks of them where they are the columns."""
    block_r: int
    block_c: int


def split(input: Tensor, map: Matrix, config: Config) -> Split:
    """Cuts a dense map into about ``config.programs`` parts for each multiprocessor."""
    channels = input.size(1)
    rows, columns, row_stride, channel_stride = map.rows, map.columns, map.columns, 0
    if not map.channels_last:
        rows, row_stride, channel_stride = input.size(0), channels * columns, columns
        if rows == 1 and input.dim() == 4:
            rows, columns = input.size(2), input.size(3)
            row_stride = columns
    group = math.gcd(map.group, columns)
    block_c = column_block(columns, min(config.elements, 64 if map.channels_last else 1024))
    block_r = min(config.elements // block_c, triton.next_power_of_2(rows))
    lanes = triton.cdiv(columns, block_c) if map.channels_last else channels
    wanted = config.programs * devices.properties(input.device).multiprocessors
    steps = triton.cdiv(triton.cdiv(rows, block_r), max(wanted // lanes, 1))
    per_split = steps * block_r
    return Split(
        rows, row_stride // group, columns, channel_stride // group, group, per_split,
        triton.cdiv(rows, per_split), lanes, block_r, block_c,
    )  # fmt: skip


@triton.jit
def locate_lane(
    split,
    lane,
    row_groups,
    columns,
    channel_groups,
    rows_per_split,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where a program's part and its channels begin, the channels and their mask.

    All but the first are ``[BLOCK_C]`` where the channels are the columns, else scalars.
    """
    start = split.to(tl.int64) * rows_per_split * (row_groups * GROUP)
    if CHANNELS_LAST:
        channel = lane * BLOCK_C + tl.arange(0, BLOCK_C)
        channel_mask = channel < columns
        first = channel
    else:
        channel = lane
        channel_mask = lane >= 0
        first = lane.to(tl.int64) * (channel_groups * GROUP)
        start += first
    return start, first, channel, channel_mask


@triton.jit
def locate_step(
    step,
    lane,
    rows,
    row_groups,
    column_groups,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Offsets from the part's first element and mask ``[BLOCK_R, BLOCK_C]`` of one step."""
    columns = column_groups * GROUP
    if CHANNELS_LAST:
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        column = lane * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        column_tiles = tl.cdiv(columns, BLOCK_C)
        row = step // column_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
        column = step % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = row.to(tl.int64)[:, None] * (row_groups * GROUP) + column[None, :]
    return offsets, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def total(tile, CHANNELS_LAST: tl.constexpr):
    """Over a tile: ``[BLOCK_C]`` where its columns are channels, else a scalar."""
    by_column = tl.sum(tile, 0)
    return by_column if CHANNELS_LAST else tl.sum(by_column, 0)


@triton.jit
def load_terms(
    input_ptr,
    other_ptr,
    output_ptr,
    offsets,
    mask,
    HAS_OTHER: tl.constexpr,
    STORE: tl.constexpr,
):
    """What statistics are taken of: ``input``, or the rounded sum with ``other``."""
    x = tl.load(input_ptr + offsets, mask, other=0.0)
    if HAS_OTHER:
        other = tl.load(other_ptr + offsets, mask, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        if STORE:
            tl.store(output_ptr + offsets, x, mask)
    return x.to(tl.float32)


@triton.jit
def tile_moments_kernel(
    input_ptr,  # the map
    other_ptr,  # another, added to it
    output_ptr,  # their sum
    partial_ptr,  # [splits, 2, channels]: mean relative to the first value, and M2
    rows,
    row_groups,
    column_groups,
    channel_groups,
    rows_per_split,
    lanes,
    channels,
    HAS_OTHER: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0) // lanes
    lane = tl.program_id(0) % lanes
    columns = column_groups * GROUP
    start, first, channel, channel_mask = locate_lane(
        split, lane, row_groups, columns, channel_groups, rows_per_split,
        GROUP, CHANNELS_LAST, BLOCK_C,
    )  # fmt: skip
    # Everything is taken relative to the map's first value, which keeps the digits of a mean far
    # from zero and gives a constant no variance, and squares relative to the first tile's mean.
    origin = load_terms(
        input_ptr, other_ptr, output_ptr, first, channel_mask, HAS_OTHER, STORE=False
    )
    if CHANNELS_LAST:
        origin = origin[None, :]
    input_ptr += start
    if HAS_OTHER:
        other_ptr += start
        output_ptr += start
    rows = tl.minimum(rows - split * rows_per_split, rows_per_split)
    steps = tl.cdiv(rows, BLOCK_R)
    count = rows
    if not CHANNELS_LAST:
        steps *= tl.cdiv(columns, BLOCK_C)
        count = rows * columns

    offsets, mask = locate_step(
        0, lane, rows, row_groups, column_groups, GROUP, CHANNELS_LAST, BLOCK_R, BLOCK_C
    )
    x = load_terms(input_ptr, other_ptr, output_ptr, offsets, mask, HAS_OTHER, True)
    inside = total(mask.to(tl.float32), CHANNELS_LAST)
    shift = total(tl.where(mask, x - origin, 0.0), CHANNELS_LAST) / tl.maximum(inside, 1.0)
    wide = tl.expand_dims(shift, 0) if CHANNELS_LAST else shift
    distance = tl.where(mask, x - origin - wide, 0.0)  # [BLOCK_R, BLOCK_C]
    sums = distance
    squares = distance * distance
    for step in range(1, steps):
        offsets, mask = locate_step(
            step, lane, rows, row_groups, column_groups, GROUP, CHANNELS_LAST, BLOCK_R, BLOCK_C
        )
        x = load_terms(input_ptr, other_ptr, output_ptr, offsets, mask, HAS_OTHER, True)
        distance = tl.where(mask, x - origin - wide, 0.0)
        sums += distance
        squares += distance * distance

    mean = total(sums, CHANNELS_LAST) / count
    m2 = total(squares, CHANNELS_LAST) - mean * mean * count
    partial_ptr += split.to(tl.int64) * (2 * channels) + channel
    tl.store(partial_ptr, shift + mean, channel_mask)
    tl.store(partial_ptr + channels, tl.where(m2 < 0.0, 0.0, m2), channel_mask)


def moments(
    op: str, input: Tensor, other: Tensor | None, output: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` of a dense ``input``, or of ``input + other``, stored."""
    map = matrix(input)

    def launch(config: Config) -> tuple[Tensor, Split]:
        part = split(input, map, config)
        partial = input.new_empty(part.splits, 2, input.size(1), dtype=torch.float32)
        tile_moments_kernel[(part.splits * part.lanes,)](
            input, other, output, partial, part.rows, part.row_groups, part.columns // part.group,
            part.channel_groups, part.rows_per_split, part.lanes, input.size(1),
            HAS_OTHER=other is not None, GROUP=part.group, CHANNELS_LAST=map.channels_last,
            BLOCK_R=part.block_r, BLOCK_C=part.block_c, num_warps=config.warps,
        )  # fmt: skip
        return partial, part

    config = tuning.select(op, shape_class(input, map), CONFIGS, launch, input.device)
    partial, part = launch(config)
    per_row = 1 if map.channels_last else part.columns
    source = input if output is None else output
    origin = source[0]
    while origin.dim() > 1:
        origin = origin[..., 0]
    return merge_moments(partial, part.rows * per_row, part.rows_per_split * per_row, origin)
