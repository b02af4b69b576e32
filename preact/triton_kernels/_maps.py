"""Feature maps as the streaming kernels see them: dense matrices in the order of memory.

A channels_last map is ``[N * H * W, C]``, a channel a column; a contiguous one is
``[N * C, H * W]``, a channel every C-th row. ``GROUP`` divides the columns: strides are passed in
groups, so that the compiler knows their divisibility and moves 16 bytes a thread wherever the shape
allows it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import memory_format_of

_WIDEST_GROUP = 16


class Config(NamedTuple):
    """Elements of a tile and warps of a program; for reductions, programs on a multiprocessor."""

    elements: int
    warps: int
    programs: int = 1


# A pass without a reduction: 16 or 32 elements a thread hide the latency.
POINTWISE = (Config(4096, 4), Config(2048, 4), Config(8192, 8))


class Matrix(NamedTuple):
    """Rows and columns of a dense map, and whether its channels are the columns."""

    rows: int
    columns: int
    channels_last: bool

    @property
    def group(self) -> int:
        return math.gcd(self.columns, _WIDEST_GROUP)


def matrix(input: Tensor) -> Matrix:
    """How a dense map lies in memory; one pixel an image counts as channels_last."""
    batch, channels, pixels = input.size(0), input.size(1), math.prod(input.shape[2:])
    if pixels == 1 or memory_format_of(input) == torch.channels_last:
        return Matrix(batch * pixels, channels, True)
    return Matrix(batch * channels, pixels, False)


def dense(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the dense layout that a result takes from ``like``."""
    return tensor.contiguous(memory_format=memory_format_of(like))


def empty(like: Tensor) -> Tensor:
    """An unwritten map in the layout that a result takes from ``like``."""
    return torch.empty_like(like, memory_format=memory_format_of(like))


def column_block(columns: int, largest: int) -> int:
    """Columns of a tile: the largest power of two that leaves at most a sixteenth of it idle."""
    block = min(triton.next_power_of_2(columns), largest)
    smallest = min(block, 32)
    best, padded = block, triton.cdiv(columns, block) * block
    while block > smallest and padded > columns + columns // 16:
        block //= 2
        if triton.cdiv(columns, block) * block < padded:
            best, padded = block, triton.cdiv(columns, block) * block
    return best


def tile_shape(map: Matrix, config: Config) -> tuple[int, int]:
    """Rows and columns of a tile of ``config.elements``."""
    block_c = column_block(map.columns, min(config.elements, 1024))
    return min(config.elements // block_c, triton.next_power_of_2(map.rows)), block_c


def shape_class(input: Tensor, map: Matrix) -> str:
    """What a measured choice is kept under: exact columns, rows to a power of two."""
    kind = "channels_last" if map.channels_last else "contiguous"
    return f"{kind} {input.dtype} {map.columns} 2**{map.rows.bit_length()}"


def check_like(name: str, tensor: Tensor | None, input: Tensor) -> None:
    """Raise for a map that is not of ``input``'s shape, type and device."""
    if tensor is None:
        return
    if tensor.shape != input.shape or tensor.dtype != input.dtype or tensor.device != input.device:
        raise RuntimeError(
            f"{name} must be {tuple(input.shape)} in {input.dtype} on {input.device}, as input is,"
            f" got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
        )


def check_vectors(input: Tensor, **vectors: Tensor | None) -> None:
    """Raise for a per-channel vector of another length, device or kind of type."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != (input.size(1),) or vector.device != input.device:
            raise RuntimeError(
                f"{name} must have {input.size(1)} elements on {input.device}, got shape"
                f" {tuple(vector.shape)} on {vector.device}"
            )
        if not vector.is_floating_point():
            raise RuntimeError(f"{name} must be floating point, got {vector.dtype}")


@triton.jit
def along_channels(vector, CHANNELS_LAST: tl.constexpr):
    """``[BLOCK]`` of channels against a tile ``[BLOCK_R, BLOCK_C]``."""
    return tl.expand_dims(vector, 0 if CHANNELS_LAST else 1)


@triton.jit
def locate_tile(
    rows,
    column_groups,
    channels,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program's tile: offsets and mask ``[BLOCK_R, BLOCK_C]``, its channels and their mask.

    Tiles of the same rows are neighbours, and the grid has one dimension: the others end at 65535.
    """
    columns = column_groups * GROUP
    column_tiles = tl.cdiv(columns, BLOCK_C)
    tile = tl.program_id(0)
    first_row = (tile // column_tiles).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    row_mask = row < rows - first_row
    column = tile % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = column < columns
    offsets = (first_row + row)[:, None] * columns + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if CHANNELS_LAST:
        channel = column
        channel_mask = column_mask
    else:
        channel = ((first_row % channels).to(tl.int32) + row) % channels
        channel_mask = row_mask
    return offsets, mask, channel, channel_mask
