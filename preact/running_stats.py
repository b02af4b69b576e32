"""Running statistics: the one way in which calls of this package read them and bring them up to
date."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Norm, Statistics

_MANY = 1 << 62
"""Of so many values the biased and the unbiased variance are the same number."""


def running_statistics(norm: Norm) -> Statistics:
    """What a norm in evaluation normalises by. Where a gradient may be asked for, copies: backward
    is of what forward took, though a forward in training may have changed it since."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if torch.is_grad_enabled():
        return norm.running_mean.clone(), norm.running_var.clone()
    return norm.running_mean, norm.running_var


def update_running_stats(
    norms: Sequence[Norm], statistics: Sequence[Sequence[Tensor]], count: int | None
) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` of every norm that keeps any.

    ``statistics`` are mean and biased variance of each norm's batch, over ``count`` values a
    channel; running variances are of ``count / (count - 1)`` times as much. Without a ``count``
    they are that already: reading how many values other processes had would wait for the device.
    """
    running: list[Tensor] = []
    batch: list[Tensor] = []
    momenta: list[float] = []
    for norm, (mean, var) in zip(norms, statistics, strict=True):
        if norm.running_mean is not None and norm.running_var is not None:
            running += (norm.running_mean, norm.running_var)
            batch += (mean, var)
            momenta.append(norm.momentum)
    if not momenta:
        return
    torch.ops.preact.update_running_stats(
        running, batch, momenta, _MANY if count is None else count
    )
    if not torch.compiler.is_compiling():  # a list that an op writes keeps no count by itself
        torch.autograd.graph.increment_version(running)
