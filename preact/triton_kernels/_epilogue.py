"""How the forward convolutions end: bias, residual, the result, and the statistics of the tile."""

from __future__ import annotations

import triton
import triton.language as tl


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
