"""The 3x3 weight's gradient with few channels: two pixels side by side are one row of the sum.

A row of the sum is a pair of the normalised input's pixels, and with it the four pixels of the
gradient that its taps reach: one product of four times the output channels with twice the input's
has every tap of a kernel's row twice, and a quarter that is no tap's. Few channels fill a matrix
unit that way, the gradient needs no register, and one normalised tile serves all nine taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._conv2d_rows_weight import both, wrapped
from ._packed import activate
from ._prologue import load_norm


@triton.jit
def store_taps(
    partial,  # [..., O, 3, 3, group_in] of this split
    acc,  # [BLOCK_M, BLOCK_N]
    place,  # [BLOCK_M, BLOCK_N]: which of the partial's [group_in] an element belongs to
    tap,  # and which tap of its row it is: none outside of 0 to 2
    column,  # [BLOCK_N]
    mask,
    group_in,
):
    pointers = partial + place.to(tl.int64) * group_in + column[None, :]
    tl.store(pointers, acc, mask & (tap >= 0) & (tap < 3))


@triton.jit
def batch_norm_relu_conv2d_backward_weight_pairs_kernel(
    grad_ptr,  # [N, H, W, O]
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # [splits, 2, O, 3, 3, group_in]
    rows,  # N * H * pairs of a line
    rows_per_split,
    height,
    width,
    channels,
    group_in,
    out_height,
    out_width,
    out_channels,
    group_out,
    stride_h,  # 1, as stride, padding and dilation all are here
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    eps,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAME: tl.constexpr,
    HALVED: tl.constexpr,  # no pair has a pixel outside its line
    EVEN: tl.constexpr,  # no tile has idle channels
    WHOLE: tl.constexpr,  # no tile has idle pairs
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``activate``
    CHANNELS: tl.constexpr,  # channels and out_channels once more
    OUT_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_O: tl.constexpr = BLOCK_M // 4
    BLOCK_C: tl.constexpr = BLOCK_N // 2
    column_tiles = tl.cdiv(group_in, BLOCK_C)
    lane = tl.arange(0, BLOCK_M)
    around = lane // BLOCK_O
    out_channel = (tl.program_id(0) // column_tiles) * BLOCK_O + lane % BLOCK_O
    out_mask = out_channel < group_out
    second = tl.arange(0, BLOCK_N) // BLOCK_C
    column = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_N) % BLOCK_C
    column_mask = column < group_in
    group = tl.program_id(1)

    channel = group * group_in + column
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, column_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    grad_channel = group * group_out + out_channel
    line_pairs = tl.cdiv(width, 2)
    image_pairs = height * line_pairs
    first = tl.program_id(2) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    inner = tl.arange(0, BLOCK_K)
    x = (first + inner) % line_pairs * 2
    place = (first + inner) % image_pairs
    line = (first + inner) // line_pairs
    step_x = BLOCK_K % line_pairs * 2
    step_place = BLOCK_K % image_pairs
    step_line = BLOCK_K // line_pairs

    above = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    beside = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    below = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # As by rows: a thread's elements are constants apart, and the tile's own channel, as what a
    # step adds, is the same number for all of them.
    in_pair = second * CHANNELS + channel
    in_pixels = (around - 1) * OUT_CHANNELS + lane % BLOCK_O
    if HALVED:
        pixel = 2 * inner.to(tl.int64)
        start_pixel = tl.cast(first, tl.int64) * 2
    else:
        # Lines begin at a pair of their own, so that a tile's are not evenly spaced.
        pixel = 2 * inner.to(tl.int64) - (line - first // line_pairs)
        start_pixel = tl.cast(first, tl.int64) * 2 - first // line_pairs
    on = tl.where(out_mask, around - 1, -(2**30))
    below_by = width * out_channels
    own_channel = tl.cast(
        group * group_out + (tl.program_id(0) // column_tiles) * BLOCK_O, tl.int64
    )
    for start in range(first, last, BLOCK_K):
        row_mask = start + inner < last
        in_tile = pixel[:, None] * CHANNELS + in_pair[None, :]
        in_grad = pixel[:, None] * OUT_CHANNELS + in_pixels[None, :]
        inside = both(second[None, :] >= 0, row_mask[:, None], WHOLE)
        if not HALVED:
            inside &= x[:, None] + second[None, :] < width
        source = input_ptr + start_pixel * channels + in_tile
        if EVEN and WHOLE and HALVED:
            values = tl.load(source)  # [BLOCK_K, BLOCK_N]
        else:
            values = tl.load(source, both(inside, column_mask[None, :], EVEN), other=0.0)
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside,
            not (WHOLE and HALVED), CODE,
        )  # fmt: skip

        reaches = (x[:, None] + on[None, :]).to(tl.uint32) < width
        reaches = both(reaches, row_mask[:, None], WHOLE)
        result = grad_ptr + start_pixel * out_channels + own_channel
        # The kernel's first row takes a pixel to the line below.
        mask = reaches & (place < image_pairs - line_pairs)[:, None]
        grad = tl.load(result + below_by + in_grad, mask, other=0.0)  # [BLOCK_K, BLOCK_M]
        above = tl.dot(tl.trans(grad), activation, above, input_precision=PRECISION)
        grad = tl.load(result + in_grad, reaches, other=0.0)
        beside = tl.dot(tl.trans(grad), activation, beside, input_precision=PRECISION)
        mask = reaches & (place >= line_pairs)[:, None]
        grad = tl.load(result - below_by + in_grad, mask, other=0.0)
        below = tl.dot(tl.trans(grad), activation, below, input_precision=PRECISION)

        place = wrapped(place + step_place, image_pairs)
        start_pixel += 2 * BLOCK_K
        if not HALVED:
            pixel -= step_line + tl.where(x + step_x >= 2 * line_pairs, 1, 0)
        x = wrapped(x + step_x, 2 * line_pairs)

    partial = partial_ptr + tl.program_id(2).to(tl.int64) * (2 * 9) * out_channels * group_in
    mask = out_mask[:, None] & column_mask[None, :]
    tap = second[None, :] - around[:, None] + 2
    place = (second[None, :] * out_channels + grad_channel[:, None]) * 9 + tap
    store_taps(partial, above, place, tap, column, mask, group_in)
    store_taps(partial, beside, place + 3, tap, column, mask, group_in)
    store_taps(partial, below, place + 6, tap, column, mask, group_in)
