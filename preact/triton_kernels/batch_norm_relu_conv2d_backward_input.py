"""Backward to the BN-ReLU: gradient of ``z``, masked in the epilogue, and its two sums.

An implicit matrix product: rows are input pixels, columns input channels, and the sum runs over
blocks of output channels and, for each, the taps that reach the pixel. With a stride the pixels of
one residue class (h modulo stride_h, w modulo stride_w) share their taps, so each program takes
rows of one class and no product is with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import costs, reference, tuning
from .. import device as devices
from ._conv2d_rows import batch_norm_relu_conv2d_backward_input_rows_kernel
from ._epilogue import store_masked_with_sums
from ._maps import check_like, check_vectors
from ._packed import gradient_code
from ._partials import merge_sums
from ._pending import form_gradient, load_gradient, with_forming
from ._prologue import (
    Config,
    channels_last,
    float32_precision,
    in_range,
    lies_flat,
    like_layout,
    residue_taps,
    rows_apply,
    shape_class,
    sizes,
)
from ._tiles import product_configs


@triton.jit
def batch_norm_relu_conv2d_backward_input_kernel(
    grad_ptr,  # [N, P, Q, O]
    pending_ptr,  # [N, P, Q, O]: input of the following norm
    coefficients_ptr,  # [4, O]
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    conv_weight_ptr,  # [O, KERNEL_H, KERNEL_W, group_in]
    formed_ptr,  # [N, P, Q, O]: where the gradient goes that was pending
    grad_activation_ptr,  # [N, H, W, C]: what other users of the activation contribute
    grad_z_ptr,  # [N, H, W, C]
    partial_ptr,  # [classes * row tiles, 2, C]: sums of dz * xhat and of dz
    rows,  # of the largest class: N * class_height * class_width
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
    padding_w,
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
    KERNEL_ROWS: tl.constexpr,  # 1
    FLAT: tl.constexpr,  # each row of a class lies over a pixel of the gradient
    EVEN: tl.constexpr,  # no tile has idle columns
    FORM_M: tl.constexpr,  # pixels and channels of which a pending gradient is formed at once
    FORM_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    column_tiles = tl.cdiv(group_in, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = in_range(column, group_in, EVEN)
    group = tl.program_id(1)
    residue_h = tl.program_id(2) // stride_w
    residue_w = tl.program_id(2) % stride_w
    first_h, taps_h = residue_taps(residue_h, KERNEL_H, stride_h, padding_h, dilation_h, period_h)
    first_w, taps_w = residue_taps(residue_w, KERNEL_W, stride_w, padding_w, dilation_w, period_w)
    # Both divide without a remainder, by the choice of first and period.
    base_h = (residue_h + padding_h - first_h * dilation_h) // stride_h
    base_w = (residue_w + padding_w - first_w * dilation_w) // stride_w
    back_h = period_h * dilation_h // stride_h
    back_w = period_w * dilation_w // stride_w

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    line = row // class_width
    p = line % class_height
    q = row % class_width
    image = (line // class_height).to(tl.int64)
    h = p * stride_h + residue_h
    w = q * stride_w + residue_w
    valid = (row < rows) & (h < height) & (w < width)
    corner = ((image * out_height + p) * out_width + q) * out_channels + group * group_out
    p = tl.where(valid, p, -(2**30))
    inner = tl.arange(0, BLOCK_K)

    if PENDING:
        first = row_tile * BLOCK_M
        if AT_STEPS:
            stores = (tl.program_id(0) % column_tiles == 0) & (tl.program_id(2) == 0)
            last = tl.where(stores, first + BLOCK_M, 0)
        else:
            lowest = (base_h - (taps_h - 1) * back_h) * out_width + base_w - (taps_w - 1) * back_w
            highest = tl.maximum(base_h * out_width + base_w, 0)
            last = tl.where(taps_h * taps_w > 0, first + BLOCK_M + highest, 0)
            first += tl.minimum(lowest, 0)
        form_gradient(
            grad_ptr, pending_ptr, coefficients_ptr, formed_ptr, first, last,
            rows, group, group_out, out_channels, CODE, EVEN, FORM_M, FORM_K,
        )  # fmt: skip
        if not AT_STEPS:
            grad_ptr = formed_ptr

    # Which taps reach a pixel, a bit each: a test costs a third of comparing.
    BITS: tl.constexpr = TAPS <= 31
    reached = tl.zeros((BLOCK_M,), tl.int32)
    if BITS:
        for place in tl.static_range(TAPS):
            y = p + (base_h - (place // KERNEL_W) * back_h)
            x = q + (base_w - (place % KERNEL_W) * back_w)
            inside = (y.to(tl.uint32) < out_height) & (x.to(tl.uint32) < out_width)
            reached += tl.where(inside, 1 << place, 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Within a tile 32 bits count; what a step adds is the same number for all of its elements.
    in_tile = tl.arange(0, BLOCK_M)[:, None] * out_channels + inner[None, :]
    in_filters = ((group * group_out + inner) * (TAPS * group_in))[:, None] + column[None, :]
    tap_h = 0
    tap_w = 0
    block = 0
    for _ in range(tl.cdiv(group_out, BLOCK_K) * taps_h * taps_w):
        out_channel = block + inner
        out_mask = in_range(out_channel, group_out, EVEN)
        up = base_h - tap_h * back_h
        left = base_w - tap_w * back_w
        if BITS:
            inside = (reached & (1 << (tap_h * KERNEL_W + tap_w))) != 0
        else:
            y = p + up
            x = q + left
            inside = (y.to(tl.uint32) < out_height) & (x.to(tl.uint32) < out_width)
        if FLAT:
            first = row_tile * BLOCK_M + up * out_width + left
            tile = tl.cast(first, tl.int64) * out_channels + group * group_out + block
            offsets = in_tile
        else:
            tile = 0
            shift = (up.to(tl.int64) * out_width + left) * out_channels
            offsets = (corner + shift)[:, None] + out_channel[None, :]
        grad = load_gradient(
            grad_ptr, pending_ptr, coefficients_ptr, tile, offsets, inside,
            group * group_out + out_channel, out_channels, out_mask, AT_STEPS, CODE, EVEN,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        tap = (first_h + tap_h * period_h) * KERNEL_W + first_w + tap_w * period_w
        taps = tl.load(
            conv_weight_ptr + (block * TAPS + tap) * group_in + in_filters,
            out_mask[:, None] & column_mask[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(grad, taps, acc, input_precision=PRECISION)
        tap_w += 1
        next_line = tap_w == taps_w
        tap_w = tl.where(next_line, 0, tap_w)
        tap_h = tl.where(next_line, tap_h + 1, tap_h)
        next_block = tap_h == taps_h
        tap_h = tl.where(next_block, 0, tap_h)
        block = tl.where(next_block, block + BLOCK_K, block)

    tile = tl.program_id(2) * (tl.num_programs(0) // column_tiles) + row_tile
    store_masked_with_sums(
        acc, ((image * height + h) * width + w) * channels, valid, tile,
        group * group_in + column, column_mask, channels,
        input_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, grad_activation_ptr, grad_z_ptr,
        partial_ptr, eps, HAS_WEIGHT, HAS_BIAS, HAS_GRAD_ACTIVATION,
    )  # fmt: skip


def batch_norm_relu_conv2d_backward_input(
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
    grad_activation: Tensor | None = None,
    formed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, and two arguments of the composite op alone.

    ``grad_activation``, like ``input``, joins before the mask. ``formed``, channels_last and
    unwritten, takes the gradient that was pending; only where ``lies_flat``.
    """
    size = sizes(
        input, conv_weight, stride, padding, dilation, groups,
        grad_output=grad_output, pending_input=pending_input,
    )  # fmt: skip
    check_vectors(input, mean=mean, var=var, weight=weight, bias=bias)
    check_like("grad_activation", grad_activation, input)
    kernel = tuple(conv_weight.shape[2:])
    precision = float32_precision(input.dtype)
    pending = None
    flat = lies_flat(size, stride)
    if flat and pending_input is not None and coefficients is not None:
        pending, coefficients = channels_last(pending_input), coefficients.contiguous()
        if formed is None:
            formed = torch.empty_like(grad_output, memory_format=torch.channels_last)
    else:
        grad_output = reference.formed_gradient(grad_output, pending_input, coefficients)
    added = None if grad_activation is None else channels_last(grad_activation)
    source, filters, grad = map(channels_last, (input, conv_weight, grad_output))
    grad_z = torch.empty_like(source, memory_format=torch.channels_last)
    class_height, class_width = (
        triton.cdiv(size.height, stride[0]),
        triton.cdiv(size.width, stride[1]),
    )
    rows = input.size(0) * class_height * class_width
    classes = stride[0] * stride[1]
    capability = devices.properties(input.device).capability
    code = gradient_code(input.dtype, capability)
    periods = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]

    def launch(config: Config) -> Tensor:
        whole_rows = config.row_taps > 1
        run = (
            batch_norm_relu_conv2d_backward_input_rows_kernel
            if whole_rows
            else batch_norm_relu_conv2d_backward_input_kernel
        )
        row_tiles = triton.cdiv(rows, config.block_m - 2 * dilation[1] * whole_rows)
        partial = mean.new_empty(classes * row_tiles, 2 * size.channels)
        grid = (row_tiles * triton.cdiv(size.group_in, config.block_n), groups, classes)
        run[grid](
            grad, pending, coefficients, source, mean, var, weight, bias, filters, formed, added,
            grad_z, partial, rows, class_height, class_width, *size, *stride, *padding, *dilation,
            *periods, eps, KERNEL_H=kernel[0], KERNEL_W=kernel[1], PENDING=pending is not None,
            AT_STEPS=pending is not None and config.at_steps > 0,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            HAS_GRAD_ACTIVATION=added is not None,
            PRECISION=precision, CODE=code, KERNEL_ROWS=config.kernel_rows if stride[0] == 1 else 1,
            FLAT=flat,
            EVEN=size.group_in % config.block_n == 0 and size.group_out % config.block_k == 0,
            FORM_M=min(config.block_m // 2, 1 << rows.bit_length() - 1),
            FORM_K=max(math.gcd(size.group_out, 64), config.block_k),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return partial

    by_rows = rows_apply(kernel, stride, padding, dilation) and precision != "ieee"
    key = shape_class(
        rows, size, kernel, stride, by_rows, pending is not None, input.dtype, precision
    )
    choices = product_configs(
        size.group_in, size.group_out, kernel[0] * kernel[1], by_rows * kernel[0], input.dtype,
        precision, capability, gradient=True,
    )  # fmt: skip
    if pending is not None and precision != "ieee":
        layer = costs.layer(input.shape, conv_weight.shape, stride, padding, dilation)
        choices = with_forming(choices, size, layer, input.dtype, capability)
    op = "batch_norm_relu_conv2d_backward_input"
    config = tuning.select(op, key, choices, launch, input.device)
    sums = merge_sums(launch(config), size.channels, mean.dtype)
    return (like_layout(grad_z, input), *sums)
