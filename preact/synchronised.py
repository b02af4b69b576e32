"""Batch norm over several processes, made of the same fused kernels.

``torch.nn.SyncBatchNorm`` has kernels of its own, for GPUs alone and without the ReLU. Here its
statistics are exchanged, and the normalisation runs as one with given statistics, through whatever
fused function the norm stands in front of. What the batch's statistics owe to the input goes
through ``weight`` and ``bias``, whose values it leaves alone:

    weight * sqrt(var0 + eps) / sqrt(var + eps)
    bias + (mean0 - mean) * weight / sqrt(var0 + eps)

with ``mean0, var0`` the same numbers as ``mean, var``, as constants. The fused backward's two sums
are then the gradients of ``var`` and ``mean``, to be added up over the processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import Norm
from .reference import accumulate_dtype, per_channel
from .running_stats import update_running_stats


def is_synchronised(bn: nn.Module) -> bool:
    """Whether ``bn``, ours or ``nn.SyncBatchNorm``, would exchange statistics now."""
    if not bn.training or not hasattr(bn, "process_group"):
        return False
    group: Any = bn.process_group
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class _Statistics(torch.autograd.Function):
    """Mean and biased variance ``[C]`` of the inputs of all processes, and how many values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        own_mean, own_var = torch.ops.preact.batch_norm_stats(input)
        count = own_mean.new_full((1,), input.numel() // input.size(1))
        own = torch.cat([own_mean, own_var, count])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        means, variances, counts = torch.stack(gathered).split([*own_mean.shape * 2, 1], dim=1)
        total = counts.sum()
        share = counts / total  # [processes, 1]
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(input, mean, total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return mean, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        input, mean, total = ctx.saved_tensors
        both = torch.cat(grads[:2])
        dist.all_reduce(both, group=ctx.group)
        of_mean, of_var = (both / total).chunk(2)
        centred = input.to(mean.dtype) - per_channel(mean, input)
        grad = per_channel(of_mean, input) + centred * per_channel(2 * of_var, input)
        return grad.to(input.dtype), None


def synchronised_norm(bn: nn.Module, input: Tensor, norm: Norm) -> Norm:
    """``norm``, the arguments of ``bn``, with the statistics of all processes' inputs.

    Updates the running statistics as ``nn.SyncBatchNorm`` does. Every process must call it, with an
    ``input`` ``[N, C, H, W]`` of its own. Not differentiable twice.
    """
    mean, var, count = _Statistics.apply(input, bn.process_group)
    constant_mean, constant_var = mean.detach(), var.detach()
    update_running_stats([norm], [(constant_mean, constant_var * (count / (count - 1)))], None)
    dtype = accumulate_dtype(input.dtype)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(dtype)
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.to(dtype)
    bias = bias + (constant_mean - mean) * weight * torch.rsqrt(constant_var + norm.eps)
    weight = weight * (torch.sqrt(constant_var + norm.eps) * torch.rsqrt(var + norm.eps))
    return Norm(constant_mean, constant_var, weight, bias, False, 0.0, norm.eps)
