"""A gradient that is pending: ``dz`` and the input of a norm whose backward is yet to be applied.

Backward to the convolution's input forms it, and stores it for backward to the weight. Either each
step of the sum forms what it takes, again at every step that meets an element; or a program forms
all that its steps will take once, before them, and they load it from where it was stored. The
first moves a pass less by the letter, though that pass is one of a cache; the second issues less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import costs
from ._packed import form
from ._prologue import Config, Sizes, in_range, load_masked
from ._tiles import TENSOR_MEMORY


@triton.jit
def load_coefficients(coefficients_ptr, channel, channels, mask):
    """``[4, channels]`` of a pending gradient, for a tile whose columns are channels."""
    row = coefficients_ptr + channel
    scale = tl.load(row, mask, other=0.0)
    slope = tl.load(row + channels, mask, other=0.0)
    centre = tl.load(row + 2 * channels, mask, other=0.0)
    offset = tl.load(row + 3 * channels, mask, other=0.0)
    return scale[None, :], slope[None, :], centre[None, :], offset[None, :]


@triton.jit
def form_gradient(
    grad_ptr,
    pending_ptr,
    coefficients_ptr,
    formed_ptr,
    first,  # of the positions to form
    last,
    positions,  # N * P * Q, at least FORM_M
    group,
    group_out,
    out_channels,
    CODE: tl.constexpr,
    EVEN: tl.constexpr,
    FORM_M: tl.constexpr,
    FORM_K: tl.constexpr,
):
    """Forms a pending gradient between two positions, and stores it for whoever reads it.

    Programs that read it themselves form all of it that they read, what neighbours share each for
    itself, and store the same there: no program waits for another.
    """
    first = tl.maximum(first, 0)
    last = tl.minimum(last, positions)
    inner = tl.arange(0, FORM_K)
    in_tile = tl.arange(0, FORM_M)[:, None] * out_channels + inner[None, :]
    for block in range(0, group_out, FORM_K):
        channel = block + inner
        mask = in_range(channel, group_out, EVEN)
        scale, slope, centre, offset = load_coefficients(
            coefficients_ptr, group * group_out + channel, out_channels, mask
        )
        for position in range(first, last, FORM_M):
            # The last tile overlaps the one before it: a mask of rows takes more instructions.
            begin = tl.maximum(tl.minimum(position, last - FORM_M), 0)
            tile = tl.cast(begin, tl.int64) * out_channels + group * group_out + block
            if EVEN:
                grad = tl.load(grad_ptr + tile + in_tile)  # [FORM_M, FORM_K]
                x = tl.load(pending_ptr + tile + in_tile)
            else:
                grad = tl.load(grad_ptr + tile + in_tile, mask[None, :])
                x = tl.load(pending_ptr + tile + in_tile, mask[None, :])
            formed = form(grad, x, scale, slope, centre, offset, mask[None, :], False, CODE)
            if EVEN:
                tl.store(formed_ptr + tile + in_tile, formed)
            else:
                tl.store(formed_ptr + tile + in_tile, formed, mask[None, :])
    # What one thread stored another will load.
    tl.debug_barrier()


@triton.jit
def load_gradient(
    grad_ptr,
    pending_ptr,
    coefficients_ptr,
    tile,  # where the tile begins
    offsets,  # from there
    inside,  # [rows]
    channel,  # of the coefficients
    channels,
    mask,  # of the columns
    FORMS: tl.constexpr,
    CODE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The gradient, or where FORMS what is formed of its pending parts; nought outside."""
    grad = load_masked(grad_ptr + tile + offsets, inside[:, None], mask, EVEN)
    if FORMS:
        scale, slope, centre, offset = load_coefficients(coefficients_ptr, channel, channels, mask)
        x = load_masked(pending_ptr + tile + offsets, inside[:, None], mask, EVEN)
        grad = form(grad, x, scale, slope, centre, offset, inside[:, None], True, CODE)
    return grad


def with_forming(
    choices: tuple[Config, ...],
    size: Sizes,
    layer: costs.Layer,
    dtype: torch.dtype,
    capability: int,
) -> tuple[Config, ...]:
    """``choices`` and the first of them with steps that form a pending gradient, in their order by
    the cost model.

    Two maps, four vectors and a mask of each element pass through registers: only where the tile
    has no idle columns, and smaller where ptxas spills some of them.
    """
    once, *others = choices
    even = size.group_in % once.block_n == 0 and size.group_out % once.block_k == 0
    few = dtype == torch.float32 and 16 in (once.block_n, once.block_k)
    if not even or few or layer.meets > costs.MOST_MEETS:
        return choices
    forming = once._replace(at_steps=1)
    if capability in TENSOR_MEMORY and dtype != torch.float32 and once.block_n >= 64:
        wide = once.block_n > 64
        if once.row_taps == 1:
            most, warps = (16, 8) if wide else (32, 4)
            forming = forming._replace(block_k=min(once.block_k, most), warps=warps)
        elif wide or once.block_k < 64:
            forming = forming._replace(block_m=64, warps=8 if wide else 4)
    if capability in TENSOR_MEMORY and dtype == torch.float32 and once.block_n >= 64:
        forming = forming._replace(block_m=min(forming.block_m, 128))
    first, second = (forming, once) if layer.forms_at_steps else (once, forming)
    return (first, second, *others)
