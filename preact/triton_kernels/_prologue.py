"""What the convolutions share: normalising a tile, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCALE_BLOCK = 128


@triton.jit
def load_norm(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    channel,
    mask,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Mean, scale and bias of ``channel``; nought where ``mask`` is false."""
    mean = tl.load(mean_ptr + channel, mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.load(var_ptr + channel, mask, other=1.0).to(tl.float32) + eps)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + channel, mask, other=0.0).to(tl.float32)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def load_prepared_norm(mean_ptr, scale_ptr, bias_ptr, channel, mask, HAS_BIAS: tl.constexpr):
    """As ``load_norm``, with the scale that ``norm_scale`` computed."""
    mean = tl.load(mean_ptr + channel, mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask, other=0.0)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def norm_scale_kernel(
    var_ptr,  # [C], as the next two
    weight_ptr,
    scale_ptr,
    channels,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    _, scale, _ = load_norm(
        var_ptr, var_ptr, weight_ptr, var_ptr, channel, mask, eps, HAS_WEIGHT, False
    )
    tl.store(scale_ptr + channel, scale, mask)


def norm_scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight * rsqrt(var + eps)`` ``[C]``, bit for bit the one that ``load_norm`` computes.

    A main loop that normalises by blocks of channels would compute it for every tile again, in
    every thread of a row: more instructions than all the rest of the prologue on sm_100.
    """
    scale = torch.empty_like(var, dtype=torch.float32)
    grid = (triton.cdiv(var.numel(), _SCALE_BLOCK),)
    norm_scale_kernel[grid](
        var, weight, scale, var.numel(), eps, HAS_WEIGHT=weight is not None, BLOCK=_SCALE_BLOCK,
        num_warps=1,
    )  # fmt: skip
    return scale


@triton.jit
def normalise(x, mean, scale, bias):
    """``z`` by the arithmetic of every kernel, so that every mask is the same bit for bit."""
    return (x.to(tl.float32) - mean) * scale + bias


@triton.jit
def in_range(index, end, EVEN: tl.constexpr):
    """Whether ``index`` is before ``end``; where EVEN it always is, and no instruction asks."""
    return index >= 0 if EVEN else index < end


@triton.jit
def load_masked(pointers, row_mask, column_mask, EVEN: tl.constexpr):
    mask = row_mask if EVEN else row_mask & column_mask[None, :]
    return tl.load(pointers, mask, other=0.0)


@triton.jit
def residue_taps(residue, kernel, stride, padding, dilation, period):
    """First tap that reaches pixels of ``residue``, and how many do: every ``period``-th."""
    first = kernel
    for candidate in range(period):
        reaches = (residue + padding - candidate * dilation) % stride == 0
        first = tl.where(reaches & (first == kernel), tl.minimum(candidate, kernel), first)
    return first, tl.cdiv(kernel - first, period)


class Config(NamedTuple):
    """Tile of a convolution's matrix product, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    row_taps: int = 1
    """Taps along a row that one tile of the input serves: 1, or all three at once."""
    kernel_rows: int = 1
    """Rows of the kernel that one step of the sum takes: 1, or all at once."""
    pixels: int = 1
    """Pixels side by side in one row of the weight's sum, where a tile serves all taps: 2, or 1."""
    at_steps: int = 0
    """Whether each step of the sum forms what it takes of a pending gradient: 1, or 0 where it is
    formed once, stored and loaded from there."""


class Sizes(NamedTuple):
    """A convolution's sizes, in the order in which the kernels take them."""

    height: int
    width: int
    channels: int
    group_in: int
    out_height: int
    out_width: int
    out_channels: int
    group_out: int


def sizes(
    input: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **maps: Tensor | None,
) -> Sizes:
    """Sizes by ``input`` and the geometry; raises where an argument does not fit.

    ``maps`` are named arguments that must have the shape and type of the convolution's result.
    """
    if input.dim() != 4 or input.dtype not in DTYPES:
        raise RuntimeError(f"input must be [N, C, H, W] of {DTYPES}, got {input.dtype}")
    batch, channels, height, width = input.shape
    out_channels, group_in, *kernel = conv_weight.shape
    if conv_weight.dtype != input.dtype:
        raise RuntimeError(f"conv_weight must be {input.dtype}, got {conv_weight.dtype}")
    if group_in * groups != channels or out_channels % groups:
        raise RuntimeError(f"conv_weight {list(conv_weight.shape)} does not fit input's {channels}")
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    expected = (batch, out_channels, out_height, out_width)
    for name, tensor in maps.items():
        if tensor is not None and (tensor.shape != expected or tensor.dtype != input.dtype):
            raise RuntimeError(f"{name} must be {list(expected)} of {input.dtype}")
    # Pixels and weights are counted in 32 bits; only offsets into a map take 64.
    if max(batch * max(height * width, out_height * out_width), conv_weight.numel()) >= 2**30:
        raise RuntimeError("input must have fewer than 2**30 pixels and conv_weight elements")
    return Sizes(
        height, width, channels, group_in, out_height, out_width, out_channels,
        out_channels // groups,
    )  # fmt: skip


MOST_ROW_DILATION = 4
"""A tile of 128 rows loses twice the dilation of them to its neighbours."""


def rows_apply(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether one tile can serve the taps of a row: three of them, over rows of equal width."""
    return kernel[1] == 3 and stride[1] == 1 and padding[1] == dilation[1] <= MOST_ROW_DILATION


def lies_flat(size: Sizes, stride: Sequence[int]) -> bool:
    """Whether the pixels of a stride's class lie one by one over those of the result, so that what
    a tap takes a run of them to is a run too."""
    return all(
        triton.cdiv(extent, step) == out
        for extent, out, step in zip(size[:2], size[4:6], stride, strict=True)
    )


def float32_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: as the user lets cuDNN, for float32; else it plays no part."""
    if dtype != torch.float32:
        return "tf32"
    cudnn: Any = torch.backends.cudnn  # whose annotations lack conv
    return "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"


def shape_class(rows: int, sizes: Sizes, *rest: object) -> str:
    """What the fastest configuration depends on; pixels to the next power of two."""
    parts = (triton.next_power_of_2(rows), sizes.group_in, sizes.group_out, *rest)
    return " ".join(str(part) for part in parts)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def like_layout(result: Tensor, like: Tensor) -> Tensor:
    """``result``, computed in channels_last, in the layout the op promises for ``like``."""
    return reference.preserve_layout(result, like)
