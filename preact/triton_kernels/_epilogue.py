"""How the convolutions end: residual, result and statistics; or mask, gradient and sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ._prologue import load_norm, normalise


@triton.jit
def store_with_statistics(
    acc,  # [BLOCK_M, BLOCK_N]
    row,  # [BLOCK_M]: output pixels
    row_mask,
    count,  # of the rows that are in row_mask
    row_tile,
    out_channel,  # [BLOCK_N]
    column_mask,
    out_channels,
    conv_bias_ptr,  # [O]
    residual_ptr,  # [N, P, Q, O]
    output_ptr,  # [N, P, Q, O]
    partial_ptr,  # [row tiles, 2, O]: mean and M2
    HAS_CONV_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = row.to(tl.int64)[:, None] * out_channels + out_channel[None, :]
    if HAS_CONV_BIAS:
        acc += tl.load(conv_bias_ptr + out_channel, column_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
    result = acc.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, result, mask)

    rounded = tl.where(mask, result.to(tl.float32), 0.0)
    mean = tl.sum(rounded, 0) / count
    # A mean far from zero leaves its rounding in the sum; the residual's sum takes it out.
    mean += tl.sum(tl.where(mask, rounded - mean[None, :], 0.0), 0) / count
    deviation = tl.where(mask, rounded - mean[None, :], 0.0)
    partial = partial_ptr + row_tile.to(tl.int64) * (2 * out_channels) + out_channel
    tl.store(partial, mean, column_mask)
    tl.store(partial + out_channels, tl.sum(deviation * deviation, 0), column_mask)


@triton.jit
def store_masked_with_sums(
    acc,  # [BLOCK_M, BLOCK_N]
    pixel_offset,  # [BLOCK_M]
    row_mask,
    tile,
    channel,  # [BLOCK_N]
    column_mask,
    channels,
    input_ptr,  # [N, H, W, C]
    mean_ptr,  # [C], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    grad_activation_ptr,  # [N, H, W, C]
    grad_z_ptr,  # [N, H, W, C]
    partial_ptr,  # [tiles, 2, C]
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD_ACTIVATION: tl.constexpr,
):
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = pixel_offset[:, None] + channel[None, :]
    if HAS_GRAD_ACTIVATION:
        acc += tl.load(grad_activation_ptr + offsets, mask, other=0.0).to(tl.float32)
    values = tl.load(input_ptr + offsets, mask, other=0.0)
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, column_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    z = normalise(values, mean[None, :], scale[None, :], bias[None, :])
    grad_z = tl.where(mask & (z > 0), acc, 0.0).to(grad_z_ptr.dtype.element_ty)
    tl.store(grad_z_ptr + offsets, grad_z, mask)

    rounded = grad_z.to(tl.float32)
    invstd = tl.rsqrt(tl.load(var_ptr + channel, column_mask, other=1.0) + eps)
    centred = values.to(tl.float32) - mean[None, :]
    partial = partial_ptr + tile.to(tl.int64) * (2 * channels) + channel
    tl.store(partial, tl.sum(rounded * centred, 0) * invstd, column_mask)
    tl.store(partial + channels, tl.sum(rounded, 0), column_mask)
