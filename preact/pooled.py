"""BN-ReLU in front of a pooling as one pass each way: the stem and the transitions of a DenseNet.

No activation is written. A mean over whole windows commutes with a pointwise convolution before it,
both being linear: ``batch_norm_relu_pool2d`` takes such a convolution and runs it on the pooled
map, on a quarter of the pixels where windows are 2x2. Only the order of roundings changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, functional, serving
from .arguments import Conv, Norm, Pool
from .prefix import Affine, cast_like, differentiable_backward, eager_prefix
from .reference import memory_format_of
from .reference_pool import NOWHERE
from .running_stats import update_running_stats


class BatchNormReLUPool2d(torch.autograd.Function):
    """``pool(relu(batch_norm(input)))``; saves ``input``, vectors and each maximum's position."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        batch_stats: bool,
        pool: Pool,
    ) -> Tensor:
        output: Tensor
        output, positions = torch.ops.preact.batch_norm_relu_pool2d(
            input, mean, var, weight, bias, eps, *pool
        )
        ctx.save_for_backward(input, positions, mean, var, weight, bias)
        ctx.settings = (eps, batch_stats, pool)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, positions, mean, var, weight, bias = ctx.saved_tensors
        eps, batch_stats, pool = ctx.settings
        norm = Affine(mean, var, weight, bias, eps, batch_stats)
        if torch.is_grad_enabled():
            found = differentiable_backward(
                lambda: [pooled(eager_prefix(input, norm, [])[0], pool)],
                grad_outputs,
                [input, weight, bias],
            )
        else:
            grad_input, *sums = torch.ops.preact.batch_norm_relu_pool2d_backward(
                grad_outputs[0], positions, input, mean, var, weight, bias, eps, batch_stats, *pool
            )
            parameters = zip(sums, (weight, bias), strict=True)
            found = [
                grad_input,
                *(None if like is None else cast_like(grad, like) for grad, like in parameters),
            ]
        return (found[0], None, None, found[1], found[2], None, None, None)


def pooled(input: Tensor, pool: Pool) -> Tensor:
    kernel, stride, padding, average = pool
    if average:
        return F.avg_pool2d(input, kernel, stride)
    return F.max_pool2d(input, kernel, stride, padding)


def _is_fusible(input: Tensor, norm: Norm, pool: Pool) -> bool:
    """Whether the native kernels take these and are the better way: channels_last, on a CPU."""
    kernel, _, padding, _ = pool
    return (
        input.dim() == 4
        and input.device.type == "cpu"
        and memory_format_of(input) == torch.channels_last
        and kernel[0] * kernel[1] < NOWHERE
        and all(input.size(2 + i) + 2 * padding[i] >= kernel[i] for i in range(2))
        and serving.backend_for(input, [norm]) == "cpp"
    )


def batch_norm_relu_pool2d(
    input: Tensor, norm: Norm, pool: Pool, conv: Conv | None = None
) -> Tensor:
    """``pool(conv(relu(batch_norm(input))))``, without ``conv`` where there is none.

    ``input`` is ``[N, C, H, W]``; ``conv`` is pointwise, without stride and padding, and in front
    of a mean. Raises what ``torch.nn.functional.batch_norm``, ``conv2d`` and the pooling raise.
    """
    checks.check_norm(input, norm)
    if conv is not None:
        checks.check_conv(input, conv)
    if not _is_fusible(input, norm, pool):
        if conv is None:
            return pooled(functional.batch_norm_relu(input, *norm), pool)
        return pooled(functional.batch_norm_relu_convs2d(input, norm, [conv])[0][0], pool)
    mean, var = serving.statistics_of("cpp", input, norm, None)
    output: Tensor = BatchNormReLUPool2d.apply(
        input, mean, var, norm.weight, norm.bias, norm.eps, norm.training, pool
    )
    if norm.training:
        update_running_stats([norm], [(mean, var)], serving.values_per_channel(input))
    return output if conv is None else serving.eager_conv(output, conv)
