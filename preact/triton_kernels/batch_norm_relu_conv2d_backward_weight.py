"""Backward to the convolution's weight, with the activation computed again in the prologue.

A matrix product for each tap: rows are output channels, columns input channels, and the sum runs
over output pixels, split among programs whose partial results a second kernel adds in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import device as devices
from .. import reference, tuning
from ._conv2d_pairs_weight import batch_norm_relu_conv2d_backward_weight_pairs_kernel
from ._conv2d_rows_weight import batch_norm_relu_conv2d_backward_weight_rows_kernel
from ._conv2d_strided_weight import batch_norm_relu_conv2d_backward_weight_strided_kernel
from ._maps import check_vectors
from ._packed import activate, activation_code
from ._partials import TILES, merge_sums
from ._prologue import (
    Config,
    Sizes,
    channels_last,
    float32_precision,
    like_layout,
    load_norm,
    rows_apply,
    shape_class,
    sizes,
)
from ._tiles import weight_configs

_LEAST_STEPS = 8
"""Steps of the sum that a program takes at least, so that its partial result is worth writing."""


@triton.jit
def batch_norm_relu_conv2d_backward_weight_kernel(
    grad_ptr,  # [N, P, Q, O]
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # [splits, O, KERNEL_H, KERNEL_W, group_in]
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
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    eps,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr,  # some tap may fall outside the image
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAME: tl.constexpr,  # the result has the input's size, and each pixel of it lies above one
    HALVED: tl.constexpr,  # for the kernel by pairs
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
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    # Taps and column tiles of one split are neighbours: they read the same pixels.
    column_tiles = tl.cdiv(group_in, BLOCK_N)
    tap = tl.program_id(0) % TAPS
    tile = tl.program_id(0) // TAPS
    out_channel = (tile // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_mask = out_channel < group_out
    column = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < group_in
    group = tl.program_id(1)
    top = (tap // KERNEL_W) * dilation_h - padding_h
    left = (tap % KERNEL_W) * dilation_w - padding_w

    channel = group * group_in + column
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, column_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    grad_channel = group * group_out + out_channel
    first = tl.program_id(2) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    inner = tl.arange(0, BLOCK_K)
    # The pixel of each row moves on by additions with carry: a division costs ten times as much.
    line = (first + inner) // out_width
    q = (first + inner) % out_width
    image = line // out_height
    p = line % out_height
    step_q = BLOCK_K % out_width
    step_p = BLOCK_K // out_width % out_height
    step_image = BLOCK_K // out_width // out_height

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Within a tile 32 bits count; what a tile adds is the same number for all of its elements.
    in_tile = inner[:, None] * channels + channel[None, :]
    in_grad = inner[:, None] * out_channels + grad_channel[None, :]
    for start in range(first, last, BLOCK_K):
        row_mask = start + inner < last
        grad = tl.load(
            grad_ptr + tl.cast(start, tl.int64) * out_channels + in_grad,
            row_mask[:, None] if EVEN else row_mask[:, None] & out_mask[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        y = p * stride_h + top
        x = q * stride_w + left
        inside = row_mask & (y.to(tl.uint32) < height) & (x.to(tl.uint32) < width)
        mask = inside[:, None] if EVEN else inside[:, None] & column_mask[None, :]
        if SAME:
            above = tl.cast(start + top * width + left, tl.int64) * channels
            values = tl.load(input_ptr + above + in_tile, mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            pixel = ((image * height + y) * width + x).to(tl.int64)
            pointers = input_ptr + pixel[:, None] * channels + channel[None, :]
            values = tl.load(pointers, mask, other=0.0)
        activation = activate(
            values, mean[None, :], scale[None, :], bias[None, :], inside[:, None], PADDED, CODE
        )  # fmt: skip
        acc = tl.dot(tl.trans(grad), activation, acc, input_precision=PRECISION)
        q += step_q
        p += step_p + tl.where(q >= out_width, 1, 0)
        q = tl.where(q >= out_width, q - out_width, q)
        if not SAME:
            image += step_image + tl.where(p >= out_height, 1, 0)
        p = tl.where(p >= out_height, p - out_height, p)

    out = (tl.program_id(2).to(tl.int64) * out_channels + grad_channel) * TAPS + tap
    mask = out_mask[:, None] & column_mask[None, :]
    tl.store(partial_ptr + out[:, None] * group_in + column[None, :], acc, mask)


def pairs_apply(
    size: Sizes,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether pairs of the input's pixels can be rows of the sum: 3x3, and as many of them as of
    the result's, or with stride 2 exactly twice as many."""
    if tuple(kernel) != (3, 3) or {*padding, *dilation} != {1} or stride[0] != stride[1]:
        return False
    return stride[0] == 1 or (stride[0] == 2 and size[:2] == (2 * size[4], 2 * size[5]))


def batch_norm_relu_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pending_input: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """The op. A pending gradient is formed by PyTorch here; the composite op brings it formed."""
    size = sizes(
        input, conv_weight, stride, padding, dilation, groups,
        grad_output=grad_output, pending_input=pending_input,
    )  # fmt: skip
    check_vectors(input, mean=mean, var=var, weight=weight, bias=bias)
    out_channels, group_in, *kernel = conv_weight.shape
    precision = float32_precision(input.dtype)
    incoming = reference.formed_gradient(grad_output, pending_input, coefficients)
    source, grad = channels_last(input), channels_last(incoming)
    lines = input.size(0) * size.out_height
    properties = devices.properties(input.device)

    def launch(config: Config) -> Tensor:
        run = batch_norm_relu_conv2d_backward_weight_kernel
        block_o, block_c = config.block_m, config.block_n // config.pixels
        rows, partials = lines * size.out_width, 1
        programs = kernel[0] * kernel[1] // config.row_taps
        if config.pixels > 1 and stride[0] == 2:
            run = batch_norm_relu_conv2d_backward_weight_strided_kernel
            block_o, programs = block_o // 2, 1
        elif config.pixels > 1:
            run = batch_norm_relu_conv2d_backward_weight_pairs_kernel
            block_o, programs = block_o // 4, 1
            rows, partials = lines * triton.cdiv(size.out_width, 2), 2
        elif config.row_taps > 1:
            run = batch_norm_relu_conv2d_backward_weight_rows_kernel
        # A binary for each number of channels, which has offsets within a tile as constants.
        fixed = config.row_taps > 1 or (config.pixels > 1 and stride[0] == 1)
        tiles = programs * triton.cdiv(size.group_out, block_o) * triton.cdiv(group_in, block_c)
        steps = triton.cdiv(rows, config.block_k)
        splits = min(
            triton.cdiv(2 * properties.multiprocessors, tiles * groups),
            steps // _LEAST_STEPS,
            TILES,
        )
        steps_per_split = triton.cdiv(steps, max(splits, 1))
        splits = triton.cdiv(steps, steps_per_split)
        partial = mean.new_empty(splits * partials, conv_weight.numel())
        run[(tiles, groups, splits)](
            grad, source, mean, var, weight, bias, partial,
            rows, steps_per_split * config.block_k, *size, *stride, *padding, *dilation, eps,
            KERNEL_H=kernel[0], KERNEL_W=kernel[1], PADDED=max(padding) > 0,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            SAME=max(stride) == 1 and size[:2] == size[4:6],
            HALVED=size.out_width % config.pixels == 0,
            EVEN=size.group_out % block_o == 0 and group_in % block_c == 0,
            WHOLE=rows % config.block_k == 0,
            PRECISION=precision, CODE=activation_code(input.dtype, properties.capability),
            CHANNELS=size.channels if fixed else 0, OUT_CHANNELS=size.out_channels if fixed else 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return partial

    by_rows = rows_apply(kernel, stride, padding, dilation) and precision != "ieee"
    by_pairs = precision != "ieee" and pairs_apply(size, kernel, stride, padding, dilation)
    key = shape_class(
        lines * size.out_width, size, kernel, stride, by_rows, by_pairs, input.dtype, precision
    )
    choices = weight_configs(
        size, stride[0], by_rows, by_pairs, input.dtype, precision, properties.capability
    )
    op = "batch_norm_relu_conv2d_backward_weight"
    config = tuning.select(op, key, choices, launch, input.device)
    summed, _ = merge_sums(launch(config), conv_weight.numel(), conv_weight.dtype)
    gradient = summed.view(out_channels, *kernel, group_in).permute(0, 3, 1, 2)
    return like_layout(gradient, conv_weight)
