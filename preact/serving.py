"""Which backend serves a call, and what the functions have in common around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, choice
from .arguments import Conv, Norm, Statistics
from .running_stats import running_statistics


def parameters_of(conv: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the type that they convolve in."""
    weight, bias = conv.weight, conv.bias
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _transformed() -> bool:
    """Whether a ``torch.func`` transform is active: the Functions do not take part in those."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def backend_for(
    input: Tensor,
    norms: Sequence[Norm],
    convs: Sequence[Conv] = (),
    function: Callable[..., Any] | None = None,
    *arguments: Any,
    **options: Any,
) -> str:
    """The backend for a call: "reference" wherever a fused one could not give eager's result.

    The call is ``function(input, *arguments, **options)``, which some devices prove and time.
    """
    chosen = backends.choose(input.device.type)
    fusible = (
        input.dim() == 4
        and input.dtype in backends.DTYPES
        and input.layout is torch.strided
        and input.numel() > 0
        and all(
            vector is None or vector.is_floating_point() for norm in norms for vector in norm[:4]
        )
        and not _transformed()
    )
    if not fusible:
        return "reference"
    if chosen != backends.AUTO:
        return chosen
    if function is None:
        return "reference"
    types = [input.dtype, *(checks.compute_type(conv.weight) for conv in convs)]
    return choice.choose(partial(function, input, *arguments, **options), types)


def statistics_of(
    backend: str, input: Tensor, norm: Norm, statistics: Statistics | None
) -> Statistics:
    if not norm.training:
        return running_statistics(norm)
    if statistics is not None:
        return statistics
    mean, var = backends.table(backend).batch_norm_stats(input.detach())
    return mean, var


def values_per_channel(input: Tensor) -> int:
    """Values per channel."""
    return input.numel() // input.size(1)


class _Small(threading.local):
    count = 0


small = _Small()
"""In ``count``, the prefixes that this thread ran as eager PyTorch because their maps are small."""


def eager_norm(input: Tensor, norm: Norm) -> Tensor:
    return F.relu(F.batch_norm(input, *norm))


def eager_conv(input: Tensor, conv: Conv) -> Tensor:
    weight, bias, stride, padding, dilation, groups = conv
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
