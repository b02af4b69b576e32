"""What the functions take, under the names of ``torch.nn.functional``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Statistics = tuple[Tensor, Tensor]
"""``(mean, var)`` of one feature map: biased variance, float32 (float64 for float64), ``[C]``."""


class Norm(NamedTuple):
    """Arguments of one batch norm, as in ``torch.nn.functional.batch_norm``; tensors ``[C]``."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class Conv(NamedTuple):
    """Arguments of one convolution, as in ``torch.nn.functional.conv2d``."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1


class Pool(NamedTuple):
    """Windows of a pooling and what is taken of them: the mean, without padding, or the maximum."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    average: bool
