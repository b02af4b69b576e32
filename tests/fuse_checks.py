"""Comparison of a fused model with the same model left alone, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import preact


def results(value: Any) -> list[Tensor]:
    """Every tensor in what a model returned."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values for tensor in results(item)]


def run(model: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    """Results, input gradient, parameter gradients and buffers of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = results(model(x))
    weighted = [
        out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out) for out in outputs
    ]
    torch.cat([w.flatten() for w in weighted]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if x.grad is not None:
        grads.append(x.grad)
    return [*(o.detach() for o in outputs), *grads, *(b.clone() for b in model.buffers())]


def agree(fused: nn.Module, plain: nn.Module, x: Tensor, seed: int = 1) -> None:
    for a, b in zip(run(fused, x, seed), run(plain, x, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """Two equal models in float64, their norms with parameters that matter."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
        for module in models[-1].modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return models[0], models[1]


def image(channels: int = 8, size: int = 6, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def fused_kinds(report: preact.FusionReport) -> tuple[str, ...]:
    return tuple(entry.reason for entry in report.fused)


def norms_run(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of batch norms that a forward runs as modules of their own."""
    calls = 0
    base = nn.modules.batchnorm._BatchNorm
    original = base.forward

    def counted(self: Any, input: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(self, input)

    with monkeypatch.context() as patch:
        patch.setattr(base, "forward", counted)
        model(x)
    return calls
