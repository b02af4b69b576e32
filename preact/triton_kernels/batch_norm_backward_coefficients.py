"""Coefficients with which a consumer forms the batch norm's ``dx`` from ``dz`` and ``x``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._maps import check_vectors

_BLOCK = 256


@triton.jit
def batch_norm_backward_coefficients_kernel(
    mean_ptr,  # [C], as the next four
    var_ptr,
    weight_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    coefficients_ptr,  # [4, C]: scale, slope, centre, offset
    channels,
    count,  # values of each channel
    eps,
    HAS_WEIGHT: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    mean = tl.load(mean_ptr + channel, mask)
    invstd = tl.rsqrt(tl.load(var_ptr + channel, mask, other=1.0) + eps)
    scale = invstd
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + channel, mask).to(tl.float32)
    slope = tl.zeros_like(scale)
    offset = tl.zeros_like(scale)
    if BATCH_STATS:
        total = count.to(tl.float32)
        slope = -scale * invstd * tl.load(grad_weight_ptr + channel, mask).to(tl.float32) / total
        offset = -scale * tl.load(grad_bias_ptr + channel, mask).to(tl.float32) / total
    out = coefficients_ptr + channel
    tl.store(out, scale, mask)
    tl.store(out + channels, slope, mask)
    tl.store(out + 2 * channels, mean, mask)
    tl.store(out + 3 * channels, offset, mask)


def batch_norm_backward_coefficients(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    eps: float,
) -> Tensor:
    check_vectors(
        input, mean=mean, var=var, weight=weight, grad_weight=grad_weight, grad_bias=grad_bias
    )
    channels = input.size(1)
    coefficients = mean.new_empty(4, channels)
    batch_norm_backward_coefficients_kernel[(triton.cdiv(channels, _BLOCK),)](
        mean, var, weight, grad_weight, grad_bias, coefficients, channels,
        input.numel() // channels, eps, HAS_WEIGHT=weight is not None,
        BATCH_STATS=grad_weight is not None and grad_bias is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return coefficients
