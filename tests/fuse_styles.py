"""Small blocks in the styles in which real code writes BN -> ReLU -> conv, for tests of ``fuse_``.

``MATCHED`` lists them with what ``fuse_`` must make of their norms in training mode. All take one
``[N, 8, H, W]`` tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

C = 8
BN_RELU = "batch_norm_relu"
PREFIX = "batch_norm_relu_conv2d"
SHARED = "batch_norm_relu_convs2d"
POOLED = "batch_norm_relu_pool2d"
POOLED_PREFIX = "batch_norm_relu_conv2d_pool2d"
UNIT = "residual_unit"


def conv3(c_in: int = C, c_out: int = C, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False, **kwargs)


class Basic(nn.Module):
    """F.relu on the norm, identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(C), conv3()
        self.bn2, self.conv2 = nn.BatchNorm2d(C), conv3()

    def branch(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out)))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


DOUBLE = False


class FlaggedBasic(Basic):
    """Branches on a constant of its file and on one of its class."""

    factor = 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return out * 2 if DOUBLE else out * self.factor


class AddReversed(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.branch(x))


class AddInPlace(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x
        return out


class AddMethod(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(x)


class AddScaled(Basic):
    """alpha is no identity shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.branch(x), alpha=0.5)


class AddIntoShortcut(Basic):
    """Overwrites its input, which the caller sees; possible without gradients only."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


class ShortcutChanged(Basic):
    """The input is written to between the branch and the addition; without gradients only."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        self.relu(x)
        return out + x

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)


class Bottleneck(nn.Module):
    """One in-place ReLU module used three times."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, 4, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), conv3(4, 4, groups=2)
        self.bn3, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, C, 1)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        return self.conv3(self.relu(self.bn3(out))) + identity


class ActivatedProjection(Basic):
    """The projection reads the first activation, as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(C, C, stride=2)
        self.shortcut = nn.Sequential(nn.Conv2d(C, C, 1, stride=2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class RawProjection(ActivatedProjection):
    """The projection reads the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class ActivatedIdentity(Basic):
    """The activation itself is the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        return self.conv2(self.bn2(self.conv1(out)).relu()) + out


class SharedActivation(Basic):
    """Two branches of one activation."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        return torch.cat([self.conv1(out), self.conv2(out)], 1)


class DropPath(nn.Module):
    drop_prob = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) > self.drop_prob)


class WithDropPath(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path, self.identity = DropPath(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.identity(self.branch(x)))


class WideDropout(Basic):
    """WideResNet: dropout between ReLU and the second convolution, active in training only."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = F.dropout(F.relu(self.bn2(out)), p=self.p, training=self.training)
        return self.conv2(out) + x


class DropoutModule(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.dropout(F.relu_(self.bn1(x))))
        return self.conv2(self.dropout(self.bn2(out).relu_()))


class DenseLayer(nn.Sequential):
    """A Sequential that takes any number of tensors."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(2 * C), nn.ReLU(), conv3(2 * C, C), nn.Dropout(0.0))

    def forward(self, *features: Tensor) -> Tensor:
        return super().forward(torch.cat(features, 1))


class CallsDenseLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = DenseLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x * 2)


class ListLayer(nn.Module):
    """torchvision's dense layer: a tensor or a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(2 * C), nn.ReLU(), conv3(2 * C, C)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))


class CallsListLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ListLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer([x, x]) + self.layer(torch.cat([x, x], 1))


class PostActivation(Basic):
    """ResNet's own order: the chain lies across the layers."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + x)


class Tuple(Basic):
    """Returns the activation as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(features))))
        return out, {"features": features}


class BNReLU(nn.Module):
    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class HelperModules(nn.Module):
    """Norm and ReLU in a module of their own, the convolution in another."""

    def __init__(self) -> None:
        super().__init__()
        self.act1, self.conv1 = BNReLU(), nn.Sequential(conv3())
        self.act2, self.conv2 = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()), conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act2(self.conv1(self.act1(x)))) + x


def conv_bn_relu() -> nn.Sequential:
    return nn.Sequential(conv3(), nn.BatchNorm2d(C), nn.ReLU(inplace=True))


class KeywordOnly(Basic):
    """Arguments with defaults, tensor and not."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: int = 1) -> Tensor:
        out = self.branch(x)
        if mask is not None:
            out = out * mask
        return out * 2 if scale == 2 else out


class CheckpointedBranch(nn.Module):
    """The branch is a module that runs again in backward, to its end.

    Stopped early, as is the default, eager's norm has counted the batch again, a fused one not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv3())

    def forward(self, x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpoint(self.branch, x, use_reentrant=False) + x


class SharedBlock(nn.Module):
    """The same block at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Basic()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def odd_norms() -> nn.Sequential:
    """Every option of norm and convolution."""
    return nn.Sequential(
        nn.BatchNorm2d(C, momentum=None), nn.ReLU(), conv3(C, C, dilation=2),
        nn.BatchNorm2d(C, affine=False), nn.Identity(), nn.ReLU(),
        nn.Conv2d(C, C, 3, padding="same"),
        nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU(), nn.Conv2d(C, 4, 2, 2, bias=True),
    )  # fmt: skip


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def conv_after_norm(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv)


class Style(NamedTuple):
    make: Callable[[], nn.Module]
    kinds: tuple[str, ...]
    """Kinds of the fused norms in training mode, in order of their names' registration."""
    reason: str = ""
    """Words that the reasons of the others must contain."""


MATCHED: dict[str, Style] = {
    "basic": Style(Basic, (UNIT,) * 2),
    "flagged": Style(FlaggedBasic, (PREFIX,) * 2),
    "add_reversed": Style(AddReversed, (UNIT,) * 2),
    "add_in_place": Style(AddInPlace, (UNIT,) * 2),
    "add_method": Style(AddMethod, (UNIT,) * 2),
    "add_scaled": Style(AddScaled, (PREFIX,) * 2),
    "bottleneck": Style(Bottleneck, (UNIT,) * 3),
    "activated_projection": Style(ActivatedProjection, (UNIT,) * 2),
    "raw_projection": Style(RawProjection, (PREFIX,) * 2),
    "activated_identity": Style(ActivatedIdentity, (BN_RELU, PREFIX)),
    "shared_activation": Style(SharedActivation, (SHARED,), "no forward"),
    "drop_path": Style(WithDropPath, (UNIT,) * 2),
    "wide_dropout_off": Style(lambda: WideDropout(0.0), (UNIT,) * 2),
    "dropout_module": Style(DropoutModule, (PREFIX,) * 2),
    "sequential_pool": Style(
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(True), conv3(), nn.AvgPool2d(2)), (PREFIX,)
    ),
    "norm_relu_pool": Style(
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(True), nn.MaxPool2d(2), conv3()), (POOLED,)
    ),
    "norm_relu_conv1_mean": Style(
        lambda: nn.Sequential(
            nn.BatchNorm2d(C), nn.ReLU(True), nn.Conv2d(C, 4, 1), nn.AvgPool2d(2)
        ),
        (POOLED_PREFIX,),
    ),
    "padded_mean": Style(
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.AvgPool2d(3, 2, 1)), (BN_RELU,)
    ),
    "norm_relu_conv1_maximum": Style(
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 1), nn.MaxPool2d(2)),
        (PREFIX,),
    ),
    "sequential_args": Style(CallsDenseLayer, (PREFIX,)),
    "post_activation": Style(PostActivation, (PREFIX,), "followed by add"),
    "tuple": Style(Tuple, (BN_RELU, PREFIX)),
    "helper_modules": Style(HelperModules, (UNIT,) * 2),
    "conv_bn_relu_row": Style(
        lambda: nn.Sequential(conv_bn_relu(), conv_bn_relu(), conv_bn_relu()),
        (PREFIX, PREFIX, BN_RELU),
    ),
    "keywords": Style(KeywordOnly, (PREFIX,) * 2),
    "checkpointed_branch": Style(CheckpointedBranch, (PREFIX,)),
    "shared_block": Style(SharedBlock, (UNIT,) * 2),
    "odd_norms": Style(odd_norms, (PREFIX,) * 3),
    "standardised_conv": Style(
        lambda: conv_after_norm(StandardisedConv(C, C, 3, padding=1)), (BN_RELU,)
    ),
    "circular_conv": Style(lambda: conv_after_norm(conv3(padding_mode="circular")), (BN_RELU,)),
    "transposed_conv": Style(lambda: conv_after_norm(nn.ConvTranspose2d(C, C, 3)), (BN_RELU,)),
}
