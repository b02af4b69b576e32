"""``dx = A dz + B x + C (+ skip gradient)`` in one pass: reads dy, x (, skip), writes dx."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ._maps import (
    POINTWISE,
    Config,
    along_channels,
    check_like,
    check_vectors,
    dense,
    empty,
    locate_tile,
    matrix,
    shape_class,
    tile_shape,
)
from ._prologue import load_norm, normalise


@triton.jit
def batch_norm_relu_bwd_apply_kernel(
    grad_output_ptr,  # [rows, columns], as the next
    input_ptr,
    mean_ptr,  # [channels], as the next five
    var_ptr,
    weight_ptr,
    bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_skip_ptr,  # [rows, columns], as the next
    grad_input_ptr,
    rows,
    column_groups,
    channels,
    reciprocal,  # 1 / values per channel
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offsets, mask, channel, channel_mask = locate_tile(
        rows, column_groups, channels, GROUP, CHANNELS_LAST, BLOCK_R, BLOCK_C
    )
    x = tl.load(input_ptr + offsets, mask)  # [BLOCK_R, BLOCK_C], as the next
    grad = tl.load(grad_output_ptr + offsets, mask).to(tl.float32)
    if HAS_SKIP:
        skip = tl.load(grad_skip_ptr + offsets, mask).to(tl.float32)
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, channel_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    z = normalise(
        x,
        along_channels(mean, CHANNELS_LAST),
        along_channels(scale, CHANNELS_LAST),
        along_channels(bias, CHANNELS_LAST),
    )
    grad = tl.where(z > 0.0, grad, 0.0)
    if HAS_SUMS:
        invstd = tl.rsqrt(tl.load(var_ptr + channel, channel_mask, other=1.0).to(tl.float32) + eps)
        grad_weight = tl.load(grad_weight_ptr + channel, channel_mask, other=0.0).to(tl.float32)
        grad_bias = tl.load(grad_bias_ptr + channel, channel_mask, other=0.0).to(tl.float32)
        slope = along_channels(invstd * grad_weight * reciprocal, CHANNELS_LAST)
        grad -= along_channels(grad_bias * reciprocal, CHANNELS_LAST)
        grad -= (x.to(tl.float32) - along_channels(mean, CHANNELS_LAST)) * slope
    grad = grad * along_channels(scale, CHANNELS_LAST)
    if HAS_SKIP:
        grad += skip
    tl.store(grad_input_ptr + offsets, grad.to(grad_input_ptr.dtype.element_ty), mask)


def batch_norm_relu_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_skip: Tensor | None,
    eps: float,
) -> Tensor:
    check_like("grad_output", grad_output, input)
    check_like("grad_skip", grad_skip, input)
    check_vectors(
        input, mean=mean, var=var, weight=weight, bias=bias, grad_weight=grad_weight,
        grad_bias=grad_bias,
    )  # fmt: skip
    x, grad = dense(input, input), dense(grad_output, input)
    skip = None if grad_skip is None else dense(grad_skip, input)
    map = matrix(x)
    output = empty(x)
    has_sums = grad_weight is not None and grad_bias is not None
    reciprocal = input.size(1) / input.numel()

    def launch(config: Config) -> None:
        block_r, block_c = tile_shape(map, config)
        grid = (triton.cdiv(map.rows, block_r) * triton.cdiv(map.columns, block_c),)
        batch_norm_relu_bwd_apply_kernel[grid](
            grad, x, mean, var, weight, bias, grad_weight, grad_bias, skip, output, map.rows,
            map.columns // map.group, input.size(1), reciprocal, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SUMS=has_sums,
            HAS_SKIP=skip is not None, GROUP=map.group, CHANNELS_LAST=map.channels_last,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=config.warps,
        )  # fmt: skip

    key = f"{shape_class(x, map)} {has_sums} {skip is not None}"
    launch(tuning.select("batch_norm_relu_backward_apply", key, POINTWISE, launch, input.device))
    return output
