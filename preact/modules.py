"""Drop-in modules over ``preact.functional``, and the same for existing torch.nn modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import dense, functional, pooled
from .arguments import Pool
from .functional import Conv, Norm, Statistics
from .synchronised import is_synchronised, synchronised_norm

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
Layer = tuple[BatchNorm, nn.Conv2d]


def _norm_of(bn: BatchNorm, input: Tensor | None = None) -> Norm:
    """What ``bn`` would pass to ``batch_norm`` now, before it counts the batch."""
    if input is not None:
        bn._check_input_dim(input)
    momentum, training = bn.momentum, bn.training
    if momentum is None:
        momentum = 0.0
        if training and bn.num_batches_tracked is not None:
            momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)
    mean, var = bn.running_mean, bn.running_var
    own = training or (mean is None and var is None)
    if training and not bn.track_running_stats:
        mean = var = None
    norm = Norm(mean, var, bn.weight, bn.bias, own, momentum, bn.eps)
    if input is not None and is_synchronised(bn):
        return synchronised_norm(bn, input, norm)
    return norm


def _conv_of(conv: nn.Conv2d) -> Conv:
    return Conv(
        conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )  # fmt: skip


def _described(layers: Sequence[Layer], input: Tensor | None) -> list[tuple[Norm, Conv]]:
    """What the functions take of a unit's layers; ``input`` is that of the first."""
    return [
        (_norm_of(bn, input if i == 0 else None), _conv_of(conv))
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
    output = functional.batch_norm_relu(input, *_norm_of(bn, input), statistics=statistics)
    _count_batch(bn)
    return output


def batch_norm(bn: BatchNorm, input: Tensor) -> Tensor:
    """``bn(input)`` alone, for the places where no ReLU follows; nothing there is fused."""
    output = F.batch_norm(input, *_norm_of(bn, input))
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
    norm = _norm_of(bn, input)
    conv = _conv_of(convs[0]) if convs else None
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
        _norm_of(bn, input),
        [_conv_of(conv) for conv in convs],
        residual=residual,
        statistics=statistics,
        return_statistics=return_statistics,
        save_activation=save_activation,
    )
    _count_batch(bn)
    return found


def fused_unit(
    input: Tensor,
    layers: Sequence[Layer],
    projection: nn.Conv2d | None = None,
    save_activation: bool = False,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """A residual unit of torch.nn modules and the statistics of its result, if asked for.

    Where a norm exchanges statistics with other processes, the unit runs prefix by prefix.
    """
    if any(is_synchronised(bn) for bn, _ in layers):
        x, shortcut = input, input
        for index, (bn, conv) in enumerate(layers):
            convs = [conv] if index or projection is None else [conv, projection]
            x, *projected = fused_prefix(x, bn, convs, None, save_activation)
            shortcut = projected[0] if projected else shortcut
        return x + shortcut, None
    conv_of_shortcut = None if projection is None else _conv_of(projection)
    output, handed_on = functional.residual_unit(
        input, _described(layers, input), conv_of_shortcut, statistics=statistics,
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
    if any(map(is_synchronised, norms)):
        for layers in units:
            input, statistics = fused_unit(input, layers, None, False, statistics)
        return input, statistics
    described = [_described(layers, None if i else input) for i, layers in enumerate(units)]
    found = functional.residual_units(
        input, described, statistics=statistics, return_statistics=return_statistics
    )
    _count_batch(*norms)
    return found


def fused_dense_block(
    input: Tensor,
    layers: Sequence[tuple[BatchNorm, nn.Conv2d, BatchNorm, nn.Conv2d]],
    save_activation: bool = False,
) -> Tensor:
    """``input`` and what each layer makes of everything before it, concatenated.

    Where the block cannot run as a whole it runs prefix by prefix.
    """
    norms = [bn for first, _, second, _ in layers for bn in (first, second)]
    if not any(is_synchronised(bn) for bn in norms):
        described = [
            (
                _norm_of(first, input if i == 0 else None),
                _conv_of(conv),
                _norm_of(second),
                _conv_of(last),
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


class BatchNormReLU2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` followed by ReLU: same arguments, same state, one pass over memory.

    Input and result are ``[N, C, H, W]``; see ``preact.functional.batch_norm_relu``.
    """

    def forward(self, input: Tensor, statistics: Statistics | None = None) -> Tensor:
        return fused_batch_norm_relu(self, input, statistics)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes of a group, on CPUs as on GPUs.

    ``nn.SyncBatchNorm`` serves as well in front of the fused functions, but needs GPUs.
    """

    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        return batch_norm(self, input)


class SyncBatchNormReLU2d(SyncBatchNorm2d):
    """``BatchNormReLU2d`` with the statistics of all processes of a group."""

    def forward(self, input: Tensor, statistics: Statistics | None = None) -> Tensor:
        return fused_batch_norm_relu(self, input, statistics)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Synchronise every batch norm of ``module``, in place; state and activations stay.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes a plain ``SyncBatchNorm`` of every subclass,
    and so drops the ReLU of ``BatchNormReLU2d``. The units and networks of this package
    hold none, so that on GPUs either conversion serves them.

    Returns ``module``. Raises ``TypeError`` for a batch norm of another type, whose forward may do
    more than normalise; nothing is changed then.
    """
    known: dict[type, type] = {
        nn.BatchNorm2d: SyncBatchNorm2d,
        BatchNormReLU2d: SyncBatchNormReLU2d,
    }
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        if type(norm) not in known and not hasattr(norm, "process_group"):
            raise TypeError(f"{type(norm).__name__} cannot be synchronised")
    for norm in norms:
        norm.__class__ = known.get(type(norm), type(norm))
        norm.process_group = process_group
    return module


class BatchNormReLUConv2d(nn.Module):
    """``conv(relu(norm(input)))``, plus ``residual`` where given.

    Arguments as of ``nn.Conv2d`` and ``nn.BatchNorm2d``; the children are ``norm`` and ``conv``.
    ``save_activation`` keeps the activation for backward, faster and larger, where the default
    computes it again. Input ``[N, in_channels, H, W]``, result ``[N, out_channels, H', W']``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        save_activation: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.save_activation = save_activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_prefix(input, self.norm, [self.conv], residual, self.save_activation)[0]


class IdentityAdd(nn.Module):
    """``input + other``: the shortcut's addition as a module, for hooks and for ``fuse_``."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        output = functional.identity_add(input, other)
        assert isinstance(output, Tensor)
        return output


class _PreActUnit(nn.Module):
    """What the two units share: forward over their layers, a projection where shapes change."""

    expansion = 1
    shortcut: nn.Conv2d | None

    def __init__(self, in_channels: int, channels: int, stride: int, save_activation: bool) -> None:
        super().__init__()
        self.save_activation = save_activation
        self._in_channels, self._stride = in_channels, stride
        self._out_channels = channels * self.expansion

    def _add_shortcut(self) -> None:
        """Last, so that state_dict lists the branch first."""
        self.shortcut = None
        if self._stride != 1 or self._in_channels != self._out_channels:
            self.shortcut = nn.Conv2d(
                self._in_channels, self._out_channels, 1, self._stride, bias=False
            )

    def layers(self) -> list[Layer]:
        raise NotImplementedError

    def forward(
        self,
        input: Tensor,
        statistics: Statistics | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Statistics | None]:
        """``[N, in_channels, H, W]`` to ``[N, channels * expansion, H / stride, W / stride]``.

        ``statistics`` are those of ``input`` where the unit before returned them; with
        ``return_statistics`` the result comes with its own for the unit after (None in evaluation).
        """
        output, handed_on = fused_unit(
            input, self.layers(), self.shortcut, self.save_activation, statistics,
            return_statistics and self.training,
        )  # fmt: skip
        return (output, handed_on) if return_statistics else output


class PreActBasicBlock(_PreActUnit):
    """Two 3x3 convolutions, full pre-activation (He et al. 2016, figure 4e).

    A 1x1 convolution ``shortcut`` on the first activation stands in for the identity where
    ``stride`` or ``channels`` change the shape.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, save_activation: bool = False
    ) -> None:
        super().__init__(in_channels, channels, stride, save_activation)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self._add_shortcut()

    def layers(self) -> list[Layer]:
        return [(self.bn1, self.conv1), (self.bn2, self.conv2)]


class PreActBottleneck(_PreActUnit):
    """1x1, 3x3 and 1x1 convolutions to ``4 * channels``, full pre-activation.

    ``stride_on`` places the stride on the "3x3" (the common choice) or on the first "1x1" (the
    authors' release).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        stride_on: str = "3x3",
        save_activation: bool = False,
    ) -> None:
        super().__init__(in_channels, channels, stride, save_activation)
        if stride_on not in ("1x1", "3x3"):
            raise ValueError(f'stride_on must be "1x1" or "3x3", got {stride_on!r}')
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, first, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self._out_channels, 1, bias=False)
        self._add_shortcut()

    def layers(self) -> list[Layer]:
        return [(self.bn1, self.conv1), (self.bn2, self.conv2), (self.bn3, self.conv3)]
