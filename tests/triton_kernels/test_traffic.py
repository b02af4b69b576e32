"""Bytes that a whole unit's kernels load and store, counted by address, against the cost model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import preact
from preact import costs

from ..evidence import interpreter
from ..evidence.traffic import Traffic, count

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="counted in the interpreter alone")

MAPS = {
    "input_ptr", "other_ptr", "output_ptr", "grad_output_ptr", "grad_skip_ptr", "grad_input_ptr",
    "grad_ptr", "pending_ptr", "residual_ptr", "grad_activation_ptr", "grad_z_ptr",
    "formed_ptr",
}  # fmt: skip
BATCH, CHANNELS, SIZE = 4, 32, 8
UNITS: dict[str, Callable[[], torch.nn.Module]] = {
    "two-conv": lambda: preact.PreActBasicBlock(CHANNELS, CHANNELS),
    "bottleneck": lambda: preact.PreActBottleneck(CHANNELS, CHANNELS // 4),
}
PASSES = {"C": 24, "D": 22, "E": 21}


def layers(module: torch.nn.Module) -> list[costs.Layer]:
    convs = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    shapes = [(BATCH, conv.in_channels, SIZE, SIZE) for conv in convs]
    return [
        costs.layer(shape, conv.weight.shape, padding=conv.padding)
        for shape, conv in zip(shapes, convs, strict=True)
    ]


def passes(found: list[Traffic], itemsize: int) -> list[tuple[float, float, float]]:
    """Elements loaded and stored of maps, and how often each is, of the kernels that see maps."""
    result = []
    for launch in found:
        maps = [access for name, access in launch.tensors.items() if name in MAPS]
        if maps:
            loaded = [access for access in maps if access.loads]
            result.append(
                (
                    sum(access.loads for access in maps) / itemsize,
                    sum(access.stores for access in maps) / itemsize,
                    sum(access.reread * access.loads for access in loaded)
                    / max(sum(access.loads for access in loaded), 1),
                )
            )
    return result


@pytest.mark.parametrize(
    ("unit", "plan"), [*(("two-conv", plan) for plan in PASSES), ("bottleneck", "E")]
)
def test_a_unit_moves_what_the_model_says(unit, plan):
    """Kernel by kernel, at shapes that fill their tiles; vectors and weights are not maps."""
    module = UNITS[unit]().half()
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.float()
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE).half()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    result: list[torch.Tensor] = []
    statistics = x.detach().float().mean((0, 2, 3)), x.detach().float().var((0, 2, 3))

    def forward() -> None:
        result.append(module(x, statistics=statistics, return_statistics=True)[0])

    def backward() -> None:
        result[0].backward(torch.randn_like(result[0]))

    with preact.use_backend("triton"), preact.use_plan(plan):
        counted = passes(count(forward), 2) + passes(count(backward), 2)
    shapes = layers(module)
    model = costs.unit_forward(plan, shapes) + costs.unit_backward(plan, shapes)
    assert len(counted) == len(model)
    for (loads, stores, reread), kernel in zip(counted, model, strict=True):
        print(f"{plan} {kernel.name}: {loads:.0f} read, {stores:.0f} written, reread {reread:.2f}")
        assert loads == pytest.approx(sum(kernel.reads), rel=0.05), kernel.name
        assert stores == pytest.approx(sum(kernel.writes), rel=0.05), kernel.name
        assert reread < 9.5, f"{kernel.name} reads a map {reread:.1f} times"
    whole = sum(loads + stores for loads, stores, _ in counted) / x.numel()
    if unit == "two-conv":
        assert whole <= PASSES[plan] * 1.01
