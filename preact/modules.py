"""Drop-in modules over ``preact.functional``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional
from .calls import Layer, batch_norm, fused_batch_norm_relu, fused_prefix, fused_unit
from .folded import WHERE_FASTER
from .folded_units import folded_unit
from .functional import Statistics


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
    computes it again (small maps keep it). Input ``[N, in_channels, H, W]``, result
    ``[N, out_channels, H', W']``.
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
    folds = False
    """Whether ``fold_`` was asked for."""
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

    def folded_norms(self) -> dict[nn.Module, str]:
        """Those that ``fold_`` folds into the convolutions before them, and when."""
        return dict.fromkeys([bn for bn, _ in self.layers()[1:]], WHERE_FASTER)

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
        run = folded_unit if self.folds else fused_unit
        output, handed_on = run(
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
