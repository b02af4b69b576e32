"""Bytes that a whole unit's kernels load and store, counted by address, against the cost model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

import preact
from preact import costs, tuning
from preact.triton_kernels._prologue import Config

from ..evidence import interpreter
from ..evidence.traffic import Traffic, count

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="counted in the interpreter alone")

MAPS = {
    "input_ptr", "other_ptr", "output_ptr", "grad_output_ptr", "grad_skip_ptr", "grad_input_ptr",
    "grad_ptr", "pending_ptr", "residual_ptr", "grad_activation_ptr", "grad_z_ptr",
    "formed_ptr",
}  # fmt: skip
BATCH, SIZE = 4, 8
UNITS: dict[str, Callable[[], torch.nn.Module]] = {
    "two-conv": lambda: preact.PreActBasicBlock(32, 32),
    "wider two-conv": lambda: preact.PreActBasicBlock(64, 64),
    "bottleneck": lambda: preact.PreActBottleneck(64, 16),
}
PASSES = {
    ("two-conv", "C"): (24, 24),
    ("two-conv", "D"): (22, 22),
    ("two-conv", "E"): (21, 21),
    ("wider two-conv", "D"): (22, 22),
    ("wider two-conv", "E"): (22, 21),
    ("bottleneck", "E"): (16.5, 16.5),
}
"""By the letter, everything loaded and everything stored; and without what a program loads that it
has itself just stored, as where a pending gradient is formed once for all taps."""


class Pass(NamedTuple):
    """Elements of maps that one launch moves, each once."""

    loads: float
    stores: float
    returned: float
    """Of the loads, those of what the program that loads them has itself just stored."""
    reread: float
    """How often one that is loaded is."""


def layers(module: torch.nn.Module) -> list[costs.Layer]:
    convs = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    shapes = [(BATCH, conv.in_channels, SIZE, SIZE) for conv in convs]
    return [
        costs.layer(shape, conv.weight.shape, padding=conv.padding)
        for shape, conv in zip(shapes, convs, strict=True)
    ]


def passes(found: list[Traffic], itemsize: int) -> list[Pass]:
    """Of the kernels that see maps."""
    result = []
    for launch in found:
        maps = [access for name, access in launch.tensors.items() if name in MAPS]
        if maps:
            loads, stores, returned = (
                sum(getattr(access, of) for access in maps) / itemsize
                for of in ("loads", "stores", "returned")
            )
            again = sum(access.reread * access.loads for access in maps) / itemsize
            result.append(Pass(loads, stores, returned, again / max(loads, 1)))
    return result


def counted_unit(unit: str, plan: str) -> tuple[list[Pass], list[costs.Layer], int]:
    """Forward and backward of a unit, its layers, and the elements of its input."""
    module = UNITS[unit]().half()
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.float()
    shapes = layers(module)
    x = torch.randn(BATCH, shapes[0].input // (BATCH * SIZE * SIZE), SIZE, SIZE).half()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    result: list[torch.Tensor] = []
    statistics = x.detach().float().mean((0, 2, 3)), x.detach().float().var((0, 2, 3))

    def forward() -> None:
        result.append(module(x, statistics=statistics, return_statistics=True)[0])

    def backward() -> None:
        result[0].backward(torch.randn_like(result[0]))

    with preact.use_backend("triton"), preact.use_plan(plan):
        return passes(count(forward), 2) + passes(count(backward), 2), shapes, x.numel()


@pytest.mark.parametrize(("unit", "plan"), PASSES)
def test_a_unit_moves_what_the_model_says(unit, plan):
    """Kernel by kernel, at shapes that fill their tiles; vectors and weights are not maps."""
    counted, shapes, whole = counted_unit(unit, plan)
    model = costs.unit_forward(plan, shapes) + costs.unit_backward(plan, shapes)
    assert len(counted) == len(model)
    for found, kernel in zip(counted, model, strict=True):
        print(
            f"{unit} {plan} {kernel.name}: {found.loads:.0f} read, {found.stores:.0f} written,"
            f" {found.returned:.0f} read after writing, reread {found.reread:.2f}"
        )
        assert found.loads == pytest.approx(sum(kernel.reads) + kernel.returned, rel=0.05), kernel
        assert found.stores == pytest.approx(sum(kernel.writes), rel=0.05), kernel
        assert found.returned == pytest.approx(kernel.returned, rel=0.05), kernel
        assert found.reread < 9.5, f"{kernel.name} reads a map {found.reread:.1f} times"
    letter = sum(found.loads + found.stores for found in counted) / whole
    returned = sum(found.returned for found in counted) / whole
    most, most_of_memory = PASSES[unit, plan]
    print(f"{unit} {plan}: {letter:.3f} passes, {letter - returned:.3f} but for those")
    assert letter <= most * 1.01
    assert letter - returned <= most_of_memory * 1.01


def test_steps_that_form_a_gradient_save_the_pass_of_a_wider_unit_too(monkeypatch):
    """What is measured against forming it once, where the written default forms it once."""

    def select(op: str, key: str, configs: Sequence[Config], *_: object) -> Config:
        return next((c for c in configs if getattr(c, "at_steps", 0)), configs[0])

    monkeypatch.setattr(tuning, "select", select)
    counted, _, whole = counted_unit("wider two-conv", "E")
    assert sum(found.loads + found.stores for found in counted) / whole <= 21 * 1.01
    assert not any(found.returned for found in counted)
