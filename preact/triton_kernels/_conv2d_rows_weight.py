"""The weight's gradient three taps wide: one tile of the normalised input serves all three.

Each tap meets the same tile with a gradient that is one dilation on, in place, or one dilation back
along the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._packed import activate
from ._prologue import load_masked, load_norm


@triton.jit
def both(mask, other, ALWAYS: tl.constexpr):
    """``mask``, and ``other`` unless that is known to be always true."""
    return mask if ALWAYS else mask & other


@triton.jit
def wrapped(number, end):
    """``number``, less ``end`` from there on: as unsigned, what is negative is the larger."""
    return tl.minimum(number.to(tl.uint32), (number - end).to(tl.uint32)).to(tl.int32)


@triton.jit
def batch_norm_relu_conv2d_backward_weight_rows_kernel(
    grad_ptr,  # [N, P, W, O]
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # [splits, O, KERNEL_H, 3, group_in]
    rows,  # N * P * W
    rows_per_split,
    height,
    width,
    channels,
    group_in,
    out_height,
    out_width,
    out_channels,
    group_out,
    stride_h,
    stride_w,
    padding_h,
    padding_w,  # equal to dilation_w
    dilation_h,
    dilation_w,
    eps,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAME: tl.constexpr,  # the result is as high as the input, a line of it above each line
    HALVED: tl.constexpr,  # for the kernel by pairs
    EVEN: tl.constexpr,  # no tile has idle channels
    WHOLE: tl.constexpr,  # no tile has idle pixels
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``activate``
    CHANNELS: tl.constexpr,  # channels and out_channels once more
    OUT_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(group_in, BLOCK_N)
    tap_h = tl.program_id(0) % KERNEL_H
    tile = tl.program_id(0) // KERNEL_H
    out_channel = (tile // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_mask = out_channel < group_out
    column = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < group_in
    group = tl.program_id(1)
    top = tap_h * dilation_h - padding_h

    channel = group * group_in + column
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, column_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    grad_channel = group * group_out + out_channel
    first = tl.program_id(2) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    inner = tl.arange(0, BLOCK_K)
    at = first + inner
    x = at % width
    step_x = BLOCK_K % width
    line = at // width
    if SAME:
        # The pixel's place in its image, for a tap above moved by its lines: inside up to the same
        # number for all pixels, and one to move on instead of a line and an image.
        pixels = height * width
        place = (at + (height + tl.maximum(tl.minimum(top, 0), -height)) * width) % pixels
        step_place = BLOCK_K % pixels
        end = (height - tl.abs(top)) * width
        above = tl.cast(first + top * width, tl.int64) * channels
    else:
        image = line // out_height
        p = line % out_height
        step_p = BLOCK_K // width % out_height
        step_image = BLOCK_K // width // out_height
    right_end = width - dilation_w

    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A thread's elements are constants apart, which its instructions hold: one address serves them.
    # The compiler sees that in 64 bits, with the tile's own channel in the number all share, and as
    # long as what a step adds is not a constant too, which it would not hold in the address.
    wide, lane = inner.to(tl.int64)[:, None], tl.arange(0, BLOCK_M).to(tl.int64)[None, :]
    in_tile = wide * CHANNELS + channel.to(tl.int64)[None, :]
    in_grad = wide * OUT_CHANNELS + lane
    result = tl.cast(first, tl.int64) * out_channels + (
        group * group_out + (tile // column_tiles) * BLOCK_M
    )
    # A tap takes a position to a result one dilation on, the same, or one dilation back.
    before = in_grad - dilation_w * OUT_CHANNELS
    behind = in_grad + dilation_w * OUT_CHANNELS
    for start in range(first, last, BLOCK_K):
        row_mask = start + inner < last
        if SAME:
            inside = place < end
        else:
            y = p * stride_h + top
            inside = y.to(tl.uint32) < height
        inside = both(inside, row_mask, WHOLE)
        mask = inside[:, None] if EVEN else inside[:, None] & column_mask[None, :]
        if SAME:
            values = tl.load(input_ptr + above + in_tile, mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            pixel = ((image * height + y) * width + x).to(tl.int64)
            pointers = input_ptr + pixel[:, None] * channels + channel[None, :]
            values = tl.load(pointers, mask, other=0.0)
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside[:, None], True, CODE
        )  # fmt: skip

        reaches = both(x < right_end, row_mask, WHOLE)[:, None]
        grad = load_masked(grad_ptr + result + behind, reaches, out_mask, EVEN)
        left = tl.dot(tl.trans(grad), activation, left, input_precision=PRECISION)
        if WHOLE and EVEN:
            grad = tl.load(grad_ptr + result + in_grad)  # [BLOCK_K, BLOCK_M]
        else:
            grad = load_masked(grad_ptr + result + in_grad, row_mask[:, None], out_mask, EVEN)
        middle = tl.dot(tl.trans(grad), activation, middle, input_precision=PRECISION)
        reaches = both(x >= dilation_w, row_mask, WHOLE)[:, None]
        grad = load_masked(grad_ptr + result + before, reaches, out_mask, EVEN)
        right = tl.dot(tl.trans(grad), activation, right, input_precision=PRECISION)

        result += BLOCK_K * out_channels
        if SAME:
            above += BLOCK_K * channels
            place = wrapped(place + step_place, pixels)
            x = wrapped(x + step_x, width)
        else:
            x += step_x
            p += step_p + tl.where(x >= width, 1, 0)
            x = tl.where(x >= width, x - width, x)
            image += step_image + tl.where(p >= out_height, 1, 0)
            p = tl.where(p >= out_height, p - out_height, p)

    out = ((tl.program_id(2).to(tl.int64) * out_channels + grad_channel) * KERNEL_H + tap_h) * 3
    mask = out_mask[:, None] & column_mask[None, :]
    partial = partial_ptr + out[:, None] * group_in + column[None, :]
    tl.store(partial, left, mask)
    tl.store(partial + group_in, middle, mask)
    tl.store(partial + 2 * group_in, right, mask)
