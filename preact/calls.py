"""The functions on torch.nn modules: what they take of a module, and what they leave in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dense, functional, pooled
from .arguments import Pool
from .functional import Conv, Norm, Statistics
from .synchronised import is_synchronised, synchronised_norm

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
Layer = tuple[BatchNorm, nn.Conv2d]
_PLAIN = (nn.BatchNorm2d, nn.Conv2d)


def _tensors(
    module: nn.Module, held: Mapping[str, Tensor | None], first: str, second: str
) -> tuple[Tensor | None, Tensor | None]:
    """Two attributes of ``module``, where ``held`` is its dictionary of parameters or of buffers.

    Asked as attributes they are found where everything else was looked for in vain, which between
    kernels counts. A class of the user's may have a property of that name, and something else may
    stand in for one that is not held.
    """
    if type(module) in _PLAIN and first in held and second in held:
        return held[first], held[second]
    return getattr(module, first), getattr(module, second)


def norm_arguments(bn: BatchNorm, input: Tensor | None = None) -> Norm:
    """What ``bn`` would pass to ``batch_norm`` now, before it counts the batch."""
    if input is not None:
        bn._check_input_dim(input)
    momentum, training = bn.momentum, bn.training
    if momentum is None:
        momentum = 0.0
        if training and bn.num_batches_tracked is not None:
            momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)
    mean, var = _tensors(bn, bn._buffers, "running_mean", "running_var")
    own = training or (mean is None and var is None)
    if training and not bn.track_running_stats:
        mean = var = None
    weight, bias = _tensors(bn, bn._parameters, "weight", "bias")
    norm = Norm(mean, var, weight, bias, own, momentum, bn.eps)
    if input is not None and is_synchronised(bn):
        return synchronised_norm(bn, input, norm)
    return norm


def conv_arguments(conv: nn.Conv2d) -> Conv:
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' to be fused, got {conv.padding_mode!r}")
    weight, bias = _tensors(conv, conv._parameters, "weight", "bias")
    assert weight is not None
    return Conv(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def described_layers(layers: Sequence[Layer], input: Tensor | None) -> list[tuple[Norm, Conv]]:
    """What the functions take of a unit's layers; ``input`` is that of the first."""
    return [
        (norm_arguments(bn, input if i == 0 else None), conv_arguments(conv))
        for i, (bn, conv) in enumerate(layers)
    ]


def _count_batch(*norms: BatchNorm) -> None:
    """In place, as CUDA graphs need; after the forward, so that one that raises counts nothing."""
    for bn in norms:
        if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)


def fused_batch_norm_relu(
    bn: BatchNorm, input: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """``relu(bn(input))``."""
    output = functional.batch_norm_relu(input, *norm_arguments(bn, input), statistics=statistics)
    _count_batch(bn)
    return output


def batch_norm(bn: BatchNorm, input: Tensor) -> Tensor:
    """``bn(input)`` alone, for the places where no ReLU follows; nothing there is fused."""
    output = F.batch_norm(input, *norm_arguments(bn, input))
    _count_batch(bn)
    return output


def fused_prefix(
    input: Tensor,
    bn: BatchNorm,
    convs: Sequence[nn.Conv2d],
    residual: Tensor | None = None,
    save_activation: bool = False,
) -> tuple[Tensor, ...]:
    """``conv(relu(bn(input)))`` for each of ``convs``, ``residual`` added to the first."""
    return linked_prefix(input, bn, convs, residual, save_activation)[0]


def fused_pooled_prefix(
    input: Tensor,
    bn: BatchNorm,
    convs: Sequence[nn.Conv2d],
    pool: tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool],
) -> Tensor:
    """``pool(relu(bn(input)))``, with a pointwise convolution of ``convs`` before a mean."""
    norm = norm_arguments(bn, input)
    conv = conv_arguments(convs[0]) if convs else None
    output = pooled.batch_norm_relu_pool2d(input, norm, Pool(*pool), conv)
    _count_batch(bn)
    return output


def linked_prefix(
    input: Tensor,
    bn: BatchNorm,
    convs: Sequence[nn.Conv2d],
    residual: Tensor | None = None,
    save_activation: bool = False,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[tuple[Tensor, ...], Statistics | None]:
    """``fused_prefix`` that takes its input's statistics and hands on those of its first result."""
    found = functional.batch_norm_relu_convs2d(
        input,
        norm_arguments(bn, input),
        [conv_arguments(conv) for conv in convs],
        residual=residual,
        statistics=statistics,
        return_statistics=return_statistics,
        save_activation=save_activation,
    )
    _count_batch(bn)
    return found


def _counts_one_by_one(norms: Sequence[BatchNorm]) -> bool:
    """Whether a norm needs its batch counted, or exchanged, before the next one's arguments are
    known: one that is synchronised, or used again."""
    return len(set(norms)) < len(norms) or any(map(is_synchronised, norms))


def fused_unit(
    input: Tensor,
    layers: Sequence[Layer],
    projection: nn.Conv2d | None = None,
    save_activation: bool = False,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """A residual unit of torch.nn modules and the statistics of its result, if asked for.

    Where a norm exchanges statistics with other processes, or there is one norm twice, the unit
    runs prefix by prefix.
    """
    if _counts_one_by_one([bn for bn, _ in layers]):
        x, shortcut = input, input
        for index, (bn, conv) in enumerate(layers):
            convs = [conv] if index or projection is None else [conv, projection]
            x, *projected = fused_prefix(x, bn, convs, None, save_activation)
            shortcut = projected[0] if projected else shortcut
        return x + shortcut, None
    conv_of_shortcut = None if projection is None else conv_arguments(projection)
    output, handed_on = functional.residual_unit(
        input, described_layers(layers, input), conv_of_shortcut, statistics=statistics,
        return_statistics=return_statistics, save_activation=save_activation,
    )  # fmt: skip
    _count_batch(*(bn for bn, _ in layers))
    return output, handed_on


def fused_units(
    input: Tensor,
    units: Sequence[Sequence[Layer]],
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """``fused_unit`` of each of ``units``, around an identity shortcut, on what is before it."""
    norms = [bn for layers in units for bn, _ in layers]
    if _counts_one_by_one(norms):
        for layers in units:
            input, statistics = fused_unit(input, layers, None, False, statistics)
        return input, statistics
    described = [described_layers(layers, None if i else input) for i, layers in enumerate(units)]
    return functional.residual_units(
        input, described, statistics=statistics, return_statistics=return_statistics,
        ended=lambda index: _count_batch(*(bn for bn, _ in units[index])),
    )  # fmt: skip


def fused_dense_block(
    input: Tensor,
    layers: Sequence[tuple[BatchNorm, nn.Conv2d, BatchNorm, nn.Conv2d]],
    save_activation: bool = False,
) -> Tensor:
    """``input`` and what each layer makes of everything before it, concatenated.

    Where the block cannot run as a whole it runs prefix by prefix.
    """
    norms = [bn for first, _, second, _ in layers for bn in (first, second)]
    if not _counts_one_by_one(norms):
        described = [
            (
                norm_arguments(first, input if i == 0 else None),
                conv_arguments(conv),
                norm_arguments(second),
                conv_arguments(last),
            )
            for i, (first, conv, second, last) in enumerate(layers)
        ]
        if dense.is_fusible(input, described):
            output = dense.dense_block(input, described)
            _count_batch(*norms)
            return output
    features = [input]
    for first, conv, second, last in layers:
        (bottleneck,) = fused_prefix(torch.cat(features, 1), first, [conv], None, save_activation)
        features += fused_prefix(bottleneck, second, [last], None, save_activation)
    return torch.cat(features, 1)
