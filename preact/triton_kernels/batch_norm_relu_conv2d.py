"""Forward: ``conv2d(relu(bn(input))) + bias + residual`` and the statistics of the result.

An implicit matrix product over channels_last maps: rows are output pixels, columns output channels,
and the sum runs over blocks of input channels and, for each, the taps of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device as devices
from .. import tuning
from ._conv2d_rows import batch_norm_relu_conv2d_rows_kernel
from ._epilogue import store_with_statistics
from ._packed import activate, activation_code
from ._partials import merge_moments
from ._prologue import (
    Config,
    channels_last,
    float32_precision,
    in_range,
    like_layout,
    load_masked,
    load_prepared_norm,
    norm_scale,
    rows_apply,
    shape_class,
    sizes,
)
from ._tiles import product_configs


@triton.jit
def batch_norm_relu_conv2d_kernel(
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next two
    scale_ptr,
    bias_ptr,
    conv_weight_ptr,  # [O, KERNEL_H, KERNEL_W, group_in]
    conv_bias_ptr,  # [O]
    residual_ptr,  # [N, P, Q, O]
    output_ptr,  # [N, P, Q, O]
    partial_ptr,  # [row tiles, 2, O]: mean and M2
    rows,  # N * P * Q
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
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,  # some tap may fall outside the image
    HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE: tl.constexpr,  # of ``activate``
    KERNEL_ROWS: tl.constexpr,  # 1
    EVEN: tl.constexpr,  # no tile has idle columns
    NEAR: tl.constexpr,  # within a tile 32 bits count
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    # Column tiles of the same rows are neighbours: the input they share stays in the cache.
    column_tiles = tl.cdiv(group_out, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = row // out_width
    top = (pixel % out_height) * stride_h - padding_h
    left = (row % out_width) * stride_w - padding_w
    image = (pixel // out_height).to(tl.int64)
    corner = ((image * height + top) * width + left) * channels + group * group_in
    # That of the tile's first row, as ``corner`` of each.
    pixel = row_tile * BLOCK_M // out_width
    origin = (pixel // out_height).to(tl.int64) * height
    origin += (pixel % out_height) * stride_h - padding_h
    origin = origin * width + (row_tile * BLOCK_M % out_width) * stride_w - padding_w
    origin = origin * channels + group * group_in
    inner = tl.arange(0, BLOCK_K)
    in_tile = (corner - origin).to(tl.int32 if NEAR else tl.int64)[:, None] + inner[None, :]
    # No tap of a row past the last is inside the image.
    top = tl.where(row < rows, top, -(2**30))
    conv_weight_row = (group * group_out + column) * (TAPS * group_in)
    in_filters = conv_weight_row[None, :] + inner[:, None]
    # Which taps of a row are inside, a bit each: a test costs a third of comparing.
    BITS: tl.constexpr = TAPS <= 31
    reached = tl.zeros((BLOCK_M,), tl.int32)
    if BITS:
        for place in tl.static_range(TAPS):
            y = top + (place // KERNEL_W) * dilation_h
            x = left + (place % KERNEL_W) * dilation_w
            inside = (y.to(tl.uint32) < height) & (x.to(tl.uint32) < width)
            reached += tl.where(inside, 1 << place, 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(group_in, BLOCK_K) * TAPS):
        tap = step % TAPS
        down = (tap // KERNEL_W) * dilation_h
        across = (tap % KERNEL_W) * dilation_w
        block = (step // TAPS) * BLOCK_K
        channel = block + inner
        channel_mask = in_range(channel, group_in, EVEN)
        if BITS:
            inside = (reached & (1 << tap)) != 0
        else:
            y = top + down
            x = left + across
            inside = (y.to(tl.uint32) < height) & (x.to(tl.uint32) < width)
        tile = origin + (down.to(tl.int64) * width + across) * channels + block
        values = load_masked(
            input_ptr + tile + in_tile, inside[:, None], channel_mask, EVEN
        )  # [BLOCK_M, BLOCK_K]
        mean, scale, bias = load_prepared_norm(
            mean_ptr, scale_ptr, bias_ptr, group * group_in + channel, channel_mask, HAS_BIAS
        )
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside[:, None], PADDED, CODE
        )  # fmt: skip
        taps = tl.load(
            conv_weight_ptr + (tap * group_in + block) + in_filters,
            in_range(column, group_out, EVEN)[None, :] & channel_mask[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(activation, taps, acc, input_precision=PRECISION)

    # Nothing of what follows is begun, and takes registers, in the loop.
    tl.debug_barrier()
    store_with_statistics(
        acc, row, row < rows, tl.minimum(rows - row_tile * BLOCK_M, BLOCK_M), row_tile,
        group * group_out + column, column < group_out, out_channels,
        conv_bias_ptr, residual_ptr, output_ptr, partial_ptr, HAS_CONV_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def batch_norm_relu_conv2d(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = sizes(input, conv_weight, stride, padding, dilation, groups, residual=residual)
    out_pixels = size.out_height * size.out_width
    rows = input.size(0) * out_pixels
    kernel = tuple(conv_weight.shape[2:])
    precision = float32_precision(input.dtype)
    source, filters = channels_last(input), channels_last(conv_weight)
    added = None if residual is None else channels_last(residual)
    output = torch.empty(
        (input.size(0), size.out_channels, size.out_height, size.out_width), dtype=input.dtype,
        device=input.device, memory_format=torch.channels_last,
    )  # fmt: skip

    scale = norm_scale(var, weight, eps)
    capability = devices.properties(input.device).capability

    def launch(config: Config) -> tuple[Tensor, int]:
        whole_rows = config.row_taps > 1
        run = batch_norm_relu_conv2d_rows_kernel if whole_rows else batch_norm_relu_conv2d_kernel
        rows_per_tile = config.block_m - 2 * dilation[1] if whole_rows else config.block_m
        row_tiles = triton.cdiv(rows, rows_per_tile)
        partial = mean.new_empty(row_tiles, 2, size.out_channels)
        grid = (row_tiles * triton.cdiv(size.group_out, config.block_n), groups)
        run[grid](
            source, mean, scale, bias, filters, conv_bias, added, output, partial,
            rows, *size, *stride, *padding, *dilation,
            KERNEL_H=kernel[0], KERNEL_W=kernel[1], PADDED=max(padding) > 0,
            HAS_BIAS=bias is not None,
            HAS_CONV_BIAS=conv_bias is not None, HAS_RESIDUAL=residual is not None,
            PRECISION=precision, CODE=activation_code(input.dtype, capability),
            KERNEL_ROWS=config.kernel_rows,
            EVEN=size.group_out % config.block_n == 0 and size.group_in % config.block_k == 0,
            NEAR=(config.block_m // out_pixels + 2) * input[0].numel() < 2**31,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return partial, rows_per_tile

    by_rows = rows_apply(kernel, stride, padding, dilation) and precision != "ieee"
    key = shape_class(rows, size, kernel, stride, by_rows, input.dtype, precision)
    choices = product_configs(
        size.group_out, size.group_in, kernel[0] * kernel[1], by_rows * kernel[0], input.dtype,
        precision, capability,
    )  # fmt: skip
    config = tuning.select("batch_norm_relu_conv2d", key, choices, launch, input.device)
    partial, rows_per_tile = launch(config)
    statistics = merge_moments(partial, rows, rows_per_tile)
    return (like_layout(output, input), *statistics)
