"""Gradients of a batch norm's weight and bias behind its ReLU: reads dy and x, no mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ._maps import (
    Config,
    along_channels,
    check_like,
    check_vectors,
    dense,
    matrix,
    shape_class,
)
from ._partials import merge_sums
from ._prologue import load_norm, normalise
from ._reduction import CONFIGS, locate_lane, locate_step, split, total


@triton.jit
def batch_norm_relu_bwd_reduce_kernel(
    grad_output_ptr,  # the map, as the next
    input_ptr,
    mean_ptr,  # [channels], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # [splits, 2, channels]: of the weight, of the bias
    rows,
    row_groups,
    column_groups,
    channel_groups,
    rows_per_split,
    lanes,
    channels,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0) // lanes
    lane = tl.program_id(0) % lanes
    columns = column_groups * GROUP
    start, _, channel, channel_mask = locate_lane(
        split, lane, row_groups, columns, channel_groups, rows_per_split,
        GROUP, CHANNELS_LAST, BLOCK_C,
    )  # fmt: skip
    grad_output_ptr += start
    input_ptr += start
    rows = tl.minimum(rows - split * rows_per_split, rows_per_split)
    steps = tl.cdiv(rows, BLOCK_R)
    if not CHANNELS_LAST:
        steps *= tl.cdiv(columns, BLOCK_C)
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, channel_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    invstd = tl.rsqrt(tl.load(var_ptr + channel, channel_mask, other=1.0).to(tl.float32) + eps)
    if CHANNELS_LAST:
        mean = along_channels(mean, CHANNELS_LAST)
        scale = along_channels(scale, CHANNELS_LAST)
        bias = along_channels(bias, CHANNELS_LAST)

    of_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in range(steps):
        offsets, mask = locate_step(
            step, lane, rows, row_groups, column_groups, GROUP, CHANNELS_LAST, BLOCK_R, BLOCK_C
        )
        x = tl.load(input_ptr + offsets, mask, other=0.0)  # [BLOCK_R, BLOCK_C], as the next
        grad = tl.load(grad_output_ptr + offsets, mask, other=0.0).to(tl.float32)
        grad = tl.where(normalise(x, mean, scale, bias) > 0.0, grad, 0.0)
        of_bias += grad
        of_weight += grad * (x.to(tl.float32) - mean)

    partial_ptr += split.to(tl.int64) * (2 * channels) + channel
    tl.store(partial_ptr, total(of_weight, CHANNELS_LAST) * invstd, channel_mask)
    tl.store(partial_ptr + channels, total(of_bias, CHANNELS_LAST), channel_mask)


def batch_norm_relu_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_like("grad_output", grad_output, input)
    check_vectors(input, mean=mean, var=var, weight=weight, bias=bias)
    x, grad = dense(input, input), dense(grad_output, input)
    map, channels = matrix(x), input.size(1)

    def launch(config: Config) -> Tensor:
        part = split(x, map, config)
        partial = x.new_empty(part.splits, 2 * channels, dtype=torch.float32)
        batch_norm_relu_bwd_reduce_kernel[(part.splits * part.lanes,)](
            grad, x, mean, var, weight, bias, partial, part.rows, part.row_groups,
            part.columns // part.group, part.channel_groups, part.rows_per_split, part.lanes,
            channels, eps, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            GROUP=part.group, CHANNELS_LAST=map.channels_last, BLOCK_R=part.block_r,
            BLOCK_C=part.block_c, num_warps=config.warps,
        )  # fmt: skip
        return partial

    key = shape_class(x, map)
    config = tuning.select("batch_norm_relu_backward_reduce", key, CONFIGS, launch, input.device)
    return merge_sums(launch(config), channels, torch.float32)
