"""``relu(bn(input))`` in one pass: reads x, writes the activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ._maps import (
    POINTWISE,
    Config,
    along_channels,
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
def batch_norm_relu_fwd_kernel(
    input_ptr,  # [rows, columns]
    mean_ptr,  # [channels], as the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,  # [rows, columns]
    rows,
    column_groups,
    channels,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offsets, mask, channel, channel_mask = locate_tile(
        rows, column_groups, channels, GROUP, CHANNELS_LAST, BLOCK_R, BLOCK_C
    )
    x = tl.load(input_ptr + offsets, mask)  # [BLOCK_R, BLOCK_C]
    mean, scale, bias = load_norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, channel_mask, eps, HAS_WEIGHT, HAS_BIAS
    )
    z = normalise(
        x,
        along_channels(mean, CHANNELS_LAST),
        along_channels(scale, CHANNELS_LAST),
        along_channels(bias, CHANNELS_LAST),
    )
    # A comparison, unlike a maximum, lets NaN through.
    output = tl.where(z < 0.0, 0.0, z)
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask)


def batch_norm_relu(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    check_vectors(input, mean=mean, var=var, weight=weight, bias=bias)
    x = dense(input, input)
    map = matrix(x)
    output = empty(x)

    def launch(config: Config) -> None:
        block_r, block_c = tile_shape(map, config)
        grid = (triton.cdiv(map.rows, block_r) * triton.cdiv(map.columns, block_c),)
        batch_norm_relu_fwd_kernel[grid](
            x, mean, var, weight, bias, output, map.rows, map.columns // map.group, input.size(1),
            eps, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, GROUP=map.group,
            CHANNELS_LAST=map.channels_last, BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=config.warps,
        )  # fmt: skip

    launch(tuning.select("batch_norm_relu", shape_class(x, map), POINTWISE, launch, input.device))
    return output
