"""Kernels three taps wide, stride 1 along the row: one tile of the map serves all three taps.

A tile's rows are positions of the input's width. Each tap along the row has an accumulator of its
own, all three fed by the same normalised tile, and the accumulators meet at the end, moved by one
dilation against each other: the norm is computed once for three taps, and the input read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._epilogue import store_masked_with_sums, store_with_statistics
from ._packed import activate
from ._pending import form_gradient, load_gradient
from ._prologue import (
    in_range,
    load_masked,
    load_prepared_norm,
    residue_taps,
)


@triton.jit
def load_taps(pointers, tap, group_in, mask):
    return tl.load(pointers + tap * group_in, mask, other=0.0)


@triton.jit
def moved(acc, by, keep, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row ``i`` of the result is row ``i + by`` of ``acc``, nought where ``keep`` is false."""
    source = tl.minimum(tl.maximum(tl.arange(0, BLOCK_M) + by, 0), BLOCK_M - 1)
    index = tl.broadcast_to(source[:, None], (BLOCK_M, BLOCK_N))
    return tl.where(keep[:, None], tl.gather(acc, index, 0), 0.0)


@triton.jit
def batch_norm_relu_conv2d_rows_kernel(
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next two
    scale_ptr,
    bias_ptr,
    conv_weight_ptr,  # [O, KERNEL_H, 3, group_in]
    conv_bias_ptr,  # [O]
    residual_ptr,  # [N, P, W, O]
    output_ptr,  # [N, P, W, O]
    partial_ptr,  # [row tiles, 2, O]: mean and M2
    rows,  # N * P * W
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
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``activate``
    KERNEL_ROWS: tl.constexpr,  # that a step takes: 1, or KERNEL_H
    EVEN: tl.constexpr,  # no tile has idle columns
    NEAR: tl.constexpr,  # within a tile 32 bits count
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(group_out, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = in_range(column, group_out, EVEN)
    group = tl.program_id(1)

    # The first and last dilation_w rows of a tile only lend to their neighbours.
    results = BLOCK_M - 2 * dilation_w
    lane = tl.arange(0, BLOCK_M)
    row = row_tile * results - dilation_w + lane
    line = row // width
    column_of_image = row % width
    top = (line % out_height) * stride_h - padding_h
    image = (line // out_height).to(tl.int64)
    corner = ((image * height + top) * width + column_of_image) * channels + group * group_in
    # That of the tile's first row, as ``corner`` of each.
    first = row_tile * results - dilation_w
    line = first // width
    origin = (line // out_height).to(tl.int64) * height + (line % out_height) * stride_h - padding_h
    origin = (origin * width + first % width) * channels + group * group_in
    in_tile = (corner - origin).to(tl.int32 if NEAR else tl.int64)[:, None]
    top = tl.where((row >= 0) & (row < rows), top, -(2**30))
    inner = tl.arange(0, BLOCK_K)
    in_tile += inner[None, :]
    conv_weight_row = (group * group_out + column) * (KERNEL_H * 3 * group_in)

    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A norm loaded once serves the rows of the kernel that a step takes.
    STEPS: tl.constexpr = KERNEL_H // KERNEL_ROWS
    for step in range(tl.cdiv(group_in, BLOCK_K) * STEPS):
        channel = (step // STEPS) * BLOCK_K + inner
        channel_mask = in_range(channel, group_in, EVEN)
        mean, scale, bias = load_prepared_norm(
            mean_ptr, scale_ptr, bias_ptr, group * group_in + channel, channel_mask, HAS_BIAS
        )
        taps = conv_weight_ptr + conv_weight_row[None, :] + channel[:, None]
        mask = column_mask[None, :] & channel_mask[:, None]
        for kernel_row in tl.static_range(KERNEL_ROWS):
            tap = (step % STEPS) * KERNEL_ROWS + kernel_row
            down = tap * dilation_h
            inside = (top + down).to(tl.uint32) < height
            tile = origin + tl.cast(down, tl.int64) * width * channels + step // STEPS * BLOCK_K
            values = load_masked(
                input_ptr + tile + in_tile, inside[:, None], channel_mask, EVEN
            )  # [BLOCK_M, BLOCK_K]
            activation = activate(
                values, mean[None, :], scale[None, :], bias[None, :], inside[:, None], True, CODE
            )  # fmt: skip
            left_taps = load_taps(taps, tap * 3, group_in, mask)  # [BLOCK_K, BLOCK_N]
            middle_taps = load_taps(taps, tap * 3 + 1, group_in, mask)
            right_taps = load_taps(taps, tap * 3 + 2, group_in, mask)
            left = tl.dot(activation, left_taps, left, input_precision=PRECISION)
            middle = tl.dot(activation, middle_taps, middle, input_precision=PRECISION)
            right = tl.dot(activation, right_taps, right, input_precision=PRECISION)

    acc = moved(left, -dilation_w, column_of_image >= dilation_w, BLOCK_M, BLOCK_N)
    acc += moved(right, dilation_w, column_of_image + dilation_w < width, BLOCK_M, BLOCK_N)
    acc += middle
    # Nothing of what follows is begun, and takes registers, while three accumulators live.
    tl.debug_barrier()
    own = (lane >= dilation_w) & (lane < BLOCK_M - dilation_w) & (row < rows)
    store_with_statistics(
        acc, row, own, tl.minimum(rows - row_tile * results, results), row_tile,
        group * group_out + column, column_mask, out_channels,
        conv_bias_ptr, residual_ptr, output_ptr, partial_ptr, HAS_CONV_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def batch_norm_relu_conv2d_backward_input_rows_kernel(
    grad_ptr,  # [N, P, W, O]
    pending_ptr,  # [N, P, W, O]: input of the following norm
    coefficients_ptr,  # [4, O]
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    conv_weight_ptr,  # [O, KERNEL_H, 3, group_in]
    formed_ptr,  # [N, P, W, O]: where the gradient goes that was pending
    grad_activation_ptr,  # [N, H, W, C]: what other users of the activation contribute
    grad_z_ptr,  # [N, H, W, C]
    partial_ptr,  # [classes * row tiles, 2, C]: sums of dz * xhat and of dz
    rows,  # of the largest class: N * class_height * W
    class_height,
    class_width,
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
    period_h,  # between the taps of a class
    period_w,
    eps,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PENDING: tl.constexpr,
    AT_STEPS: tl.constexpr,  # each step forms what is pending, and it is stored for others alone
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``form``
    KERNEL_ROWS: tl.constexpr,  # that a step takes: 1, or KERNEL_H where it strides by 1
    FLAT: tl.constexpr,  # each row of a class lies over a pixel of the gradient
    EVEN: tl.constexpr,  # no tile has idle columns
    FORM_M: tl.constexpr,  # pixels and channels of which a pending gradient is formed at once
    FORM_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(group_in, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = in_range(column, group_in, EVEN)
    group = tl.program_id(1)
    residue_h = tl.program_id(2)
    first_h, taps_h = residue_taps(residue_h, KERNEL_H, stride_h, padding_h, dilation_h, period_h)
    base_h = (residue_h + padding_h - first_h * dilation_h) // stride_h
    back_h = period_h * dilation_h // stride_h

    # The first and last dilation_w rows of a tile only lend to their neighbours.
    results = BLOCK_M - 2 * dilation_w
    lane = tl.arange(0, BLOCK_M)
    row = row_tile * results - dilation_w + lane
    line = row // width
    w = row % width
    p = line % class_height
    image = (line // class_height).to(tl.int64)
    h = p * stride_h + residue_h
    corner = ((image * out_height + p) * out_width + w) * out_channels + group * group_out
    p = tl.where((row >= 0) & (row < rows), p, -(2**30))
    inner = tl.arange(0, BLOCK_K)
    # Within a tile 32 bits count; what a step adds is the same number for all of its elements.
    in_tile = lane[:, None] * out_channels + inner[None, :]

    own = (lane >= dilation_w) & (lane < BLOCK_M - dilation_w) & (row < rows) & (h < height)
    if PENDING:
        if AT_STEPS:
            stores = (tl.program_id(0) % column_tiles == 0) & (residue_h == 0)
            first = row_tile * results
            last = tl.where(stores, first + results, 0)
        else:
            first = row_tile * results - dilation_w
            last = tl.where(taps_h > 0, first + BLOCK_M + tl.maximum(base_h, 0) * out_width, 0)
            first += tl.minimum(base_h - (taps_h - 1) * back_h, 0) * out_width
        form_gradient(
            grad_ptr, pending_ptr, coefficients_ptr, formed_ptr, first, last,
            rows, group, group_out, out_channels, CODE, EVEN, FORM_M, FORM_K,
        )  # fmt: skip
        if not AT_STEPS:
            grad_ptr = formed_ptr

    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap_h = 0
    block = 0
    for _ in range(tl.cdiv(group_out, BLOCK_K) * (taps_h // KERNEL_ROWS)):
        out_channel = block + inner
        out_mask = in_range(out_channel, group_out, EVEN)
        weight_row = (group * group_out + out_channel) * (KERNEL_H * 3 * group_in)
        taps = conv_weight_ptr + weight_row[:, None] + column[None, :]
        mask = out_mask[:, None] & column_mask[None, :]
        for kernel_row in tl.static_range(KERNEL_ROWS):
            up = base_h - (tap_h + kernel_row) * back_h
            inside = (p + up).to(tl.uint32) < out_height
            if FLAT:
                first = row_tile * results - dilation_w + up * out_width
                tile = tl.cast(first, tl.int64) * out_channels + group * group_out + block
                offsets = in_tile
            else:
                tile = 0
                offsets = (corner + up.to(tl.int64) * out_width * out_channels)[:, None]
                offsets += out_channel[None, :]
            grad = load_gradient(
                grad_ptr, pending_ptr, coefficients_ptr, tile, offsets, inside,
                group * group_out + out_channel, out_channels, out_mask, AT_STEPS, CODE, EVEN,
            )  # [BLOCK_M, BLOCK_K]  # fmt: skip
            tap = first_h + (tap_h + kernel_row) * period_h
            left_taps = load_taps(taps, tap * 3, group_in, mask)  # [BLOCK_K, BLOCK_N]
            middle_taps = load_taps(taps, tap * 3 + 1, group_in, mask)
            right_taps = load_taps(taps, tap * 3 + 2, group_in, mask)
            left = tl.dot(grad, left_taps, left, input_precision=PRECISION)
            middle = tl.dot(grad, middle_taps, middle, input_precision=PRECISION)
            right = tl.dot(grad, right_taps, right, input_precision=PRECISION)
        tap_h += KERNEL_ROWS
        next_block = tap_h == taps_h
        tap_h = tl.where(next_block, 0, tap_h)
        block = tl.where(next_block, block + BLOCK_K, block)

    acc = moved(left, dilation_w, w + dilation_w < width, BLOCK_M, BLOCK_N)
    acc += moved(right, -dilation_w, w >= dilation_w, BLOCK_M, BLOCK_N)
    acc += middle
    # Nothing of what follows is begun, and takes registers, while three accumulators live.
    tl.debug_barrier()
    tile = tl.program_id(2) * (tl.num_programs(0) // column_tiles) + row_tile
    store_masked_with_sums(
        acc, ((image * height + h) * width + w) * channels, own, tile,
        group * group_in + column, column_mask, channels,
        input_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, grad_activation_ptr, grad_z_ptr,
        partial_ptr, eps, HAS_WEIGHT, HAS_BIAS, HAS_GRAD_ACTIVATION,
    )  # fmt: skip
