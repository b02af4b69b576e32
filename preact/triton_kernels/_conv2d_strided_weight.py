"""The 3x3 weight's gradient with stride 2: each pixel of the input is normalised once for all taps.

A row of the sum is a pixel of the result, and with it the four pixels of the input below it, two of
an even line and two of an odd one. The even line meets the result's line alone, the odd one that
and the next; of each, the pixel and the one after it. A product of twice the output channels with
twice the input's has the three taps of a kernel's row, and a quarter that is no tap's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._conv2d_pairs_weight import store_taps
from ._conv2d_rows_weight import both, wrapped
from ._packed import activate
from ._prologue import load_norm


@triton.jit
def batch_norm_relu_conv2d_backward_weight_strided_kernel(
    grad_ptr,  # [N, P, Q, O]
    input_ptr,  # [N, 2 P, 2 Q, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # [splits, O, 3, 3, group_in]
    rows,  # N * P * Q
    rows_per_split,
    height,
    width,
    channels,
    group_in,
    out_height,
    out_width,
    out_channels,
    group_out,
    stride_h,  # 2, as the next; padding and dilation are 1
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
    HALVED: tl.constexpr,
    EVEN: tl.constexpr,  # no tile has idle channels
    WHOLE: tl.constexpr,  # no tile has idle pixels
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``activate``
    CHANNELS: tl.constexpr,  # for the kernels by rows and by pairs, as the next
    OUT_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_O: tl.constexpr = BLOCK_M // 2
    BLOCK_C: tl.constexpr = BLOCK_N // 2
    column_tiles = tl.cdiv(group_in, BLOCK_C)
    lane = tl.arange(0, BLOCK_M)
    after = lane // BLOCK_O
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
    first = tl.program_id(2) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    inner = tl.arange(0, BLOCK_K)
    pixels = out_height * out_width
    q = (first + inner) % out_width
    first_q = first % out_width
    place = (first + inner) % pixels
    # A line of the result lies over two of the input: a pixel's place there is twice its own, and a
    # line's width more for each line before it.
    pixel = 2 * inner + ((first + inner) // out_width - first // out_width) * width
    above = tl.cast(first, tl.int64) * 2 + tl.cast(first // out_width, tl.int64) * width
    step_q = BLOCK_K % out_width
    step_line = BLOCK_K // out_width
    step_place = BLOCK_K % pixels

    upper = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lower = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Within a tile 32 bits count; what a tile adds is the same number for all of its elements.
    in_pair = second * channels + channel
    in_grad = (inner[:, None] + after[None, :]) * out_channels + grad_channel[None, :]
    below = in_grad + out_width * out_channels
    end = tl.where(out_mask, out_width - after, 0)
    result = tl.cast(first, tl.int64) * out_channels
    line_of_input = width * channels
    for start in range(first, last, BLOCK_K):
        row_mask = start + inner < last
        inside = row_mask[:, None]
        in_tile = pixel[:, None] * channels + in_pair[None, :]
        reaches = both(q[:, None] < end[None, :], inside, WHOLE)
        grad = tl.trans(tl.load(grad_ptr + result + in_grad, reaches, other=0.0))
        mask = both(inside, column_mask[None, :], EVEN)
        even = input_ptr + above * channels
        values = tl.load(even + in_tile) if EVEN and WHOLE else tl.load(even + in_tile, mask, 0.0)
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside, not WHOLE, CODE
        )  # [BLOCK_K, BLOCK_N]
        middle = tl.dot(grad, activation, middle, input_precision=PRECISION)

        odd = even + line_of_input
        values = tl.load(odd + in_tile) if EVEN and WHOLE else tl.load(odd + in_tile, mask, 0.0)
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside, not WHOLE, CODE
        )  # [BLOCK_K, BLOCK_N]
        lower = tl.dot(grad, activation, lower, input_precision=PRECISION)
        mask = reaches & (place < pixels - out_width)[:, None]
        grad = tl.trans(tl.load(grad_ptr + result + below, mask, other=0.0))
        upper = tl.dot(grad, activation, upper, input_precision=PRECISION)

        result += BLOCK_K * out_channels
        next_line = tl.where(first_q + step_q >= out_width, 1, 0)
        above += 2 * BLOCK_K + (step_line + next_line) * width
        pixel += tl.where(q + step_q >= out_width, width, 0) - next_line * width
        first_q = wrapped(first_q + step_q, out_width)
        q = wrapped(q + step_q, out_width)
        place = wrapped(place + step_place, pixels)

    partial = partial_ptr + tl.program_id(2).to(tl.int64) * 9 * out_channels * group_in
    mask = out_mask[:, None] & column_mask[None, :]
    tap = second[None, :] + 1 - 2 * after[:, None]
    place = grad_channel[:, None] * 9 + tap
    store_taps(partial, upper, place, tap, column, mask, group_in)
    store_taps(partial, middle, place + 3, tap, column, mask, group_in)
    store_taps(partial, lower, place + 6, tap, column, mask, group_in)
