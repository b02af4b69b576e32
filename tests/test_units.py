"""Every row of the paper's Tables 1 and 2: constructs, trains, and is the same fused and eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import preact
from preact.backends import available
from preact.models import UNITS, PreResNet, ResidualUnit, shortcuts

from .test_parity import compare
from .test_training import three_steps
from .tolerances import AUTOCAST, assert_same_in_float64, distance

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

TABLE_1 = [
    shortcuts.identity(),
    shortcuts.constant_scaling(0, 1), shortcuts.constant_scaling(0.5, 1),
    shortcuts.constant_scaling(0.5, 0.5),
    *(shortcuts.exclusive_gating(bias) for bias in (0, -5, -6, -7)),
    *(shortcuts.shortcut_only_gating(bias) for bias in (0, -6)),
    shortcuts.convolution(), shortcuts.dropout(0.5),
]  # fmt: skip
ROWS = (
    [("original", "basic", "A", shortcut) for shortcut in TABLE_1]
    + [
        (unit, layers, option, shortcuts.identity())
        for unit in UNITS
        for layers, option in (("basic", "A"), ("bottleneck", "B"), ("one_layer", "A"))
    ]
    # What the paper does not show but the arguments allow: one of each join before a fused sum.
    + [
        ("full_preactivation", "basic", "B", shortcuts.exclusive_gating()),
        ("full_preactivation", "bottleneck", "B", shortcuts.shortcut_only_gating()),
        ("bn_after_addition", "bottleneck", "B", shortcuts.convolution()),
        ("bn_after_addition", "one_layer", "B", shortcuts.constant_scaling()),
        ("relu_only_preactivation", "basic", "B", shortcuts.dropout()),
    ]
)


def row_name(row: object) -> str:
    return "-".join(map(str, row)) if isinstance(row, tuple) else str(row)


def network(unit: str, layers: str, option: str, shortcut: shortcuts.Shortcut) -> PreResNet:
    return PreResNet(
        layers, [2, 2], [8, 16], 10, stem_channels=8, unit=unit, option=option, shortcut=shortcut
    )


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_three_steps_agree_in_float64(row):
    """Losses, gradients and running statistics of a network to rounding."""
    eager = network(*row).double()
    fused = copy.deepcopy(eager)
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(3)]
    results = []
    for model, backend in ((eager, "reference"), (fused, "cpp")):
        torch.manual_seed(1)  # dropout draws the same elements
        results.append(three_steps(model, batches, backend))
    for expected, found in zip(*results, strict=True):
        assert_same_in_float64(found, expected)
    eager.eval(), fused.eval()
    with preact.use_backend("reference"):
        expected = eager(batches[0][0].double())
    assert_same_in_float64(fused(batches[0][0].double()), expected)


def unit_case(module: nn.Module):
    """A function of input and parameters alone, as ``compare`` wants it."""

    def case(inputs: list[Tensor], _: list[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        values = dict(zip((name for name, _ in module.named_parameters()), inputs[1:], strict=True))
        for name, buffer in module.named_buffers():
            floating = buffer.is_floating_point()
            values[name] = buffer.to(inputs[0].dtype) if floating else buffer.clone()
        return (torch.func.functional_call(module, values, (inputs[0],)),)

    return case


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_unit_is_as_near_to_float64_as_eager(row, stride):
    unit, layers, option, shortcut = row
    in_channels = 32 if layers == "bottleneck" and stride == 1 else 8
    module = ResidualUnit(
        in_channels, 8, stride, unit=unit, layers=layers, option=option, shortcut=shortcut,
        activate_before_split=stride == 1 and unit.endswith("preactivation"),
    )  # fmt: skip
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.dim() == 1 and "weighing" not in name:
                value.uniform_(0.5, 1.5)
    x = torch.randn(3, in_channels, 8, 6).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(module(x))
    compare(unit_case(module), [x, *module.parameters()], [], [grad])


@pytest.mark.parametrize("unit", UNITS)
def test_bfloat16_autocast_and_frozen_norms(unit):
    """The result has eager's type under autocast; norms in evaluation count nothing."""
    module = ResidualUnit(16, 8, 2, layers="bottleneck", unit=unit)
    x = torch.randn(4, 16, 8, 8)
    found = {}
    for backend in ("reference", "cpp"):
        with preact.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            found[backend] = module(x)
    assert found["cpp"].dtype == found["reference"].dtype
    assert distance(found["cpp"], found["reference"]) < AUTOCAST
    module.double().norms[0].eval()
    before = module.norms[0].running_mean.clone()
    with preact.use_backend("reference"):
        expected = module(x.double())
    assert_same_in_float64(module(x.double()), expected)
    assert torch.equal(module.norms[0].running_mean, before)


@pytest.mark.parametrize("unit", UNITS)
def test_kept_for_backward(unit):
    """No activation is kept: every 3x3 convolution behind a norm keeps that norm's input alone."""
    module = ResidualUnit(8, 8, unit=unit)
    x = torch.randn(4, 8, 6, 6).relu()
    kept = {}
    for backend in ("reference", "cpp"):
        maps: dict[int, int] = {}

        def pack(tensor: Tensor, maps: dict[int, int] = maps) -> Tensor:
            if tensor.numel() >= x.numel():
                maps[tensor.untyped_storage().data_ptr()] = 1
            return tensor

        with (
            preact.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            module(x)
        kept[backend] = len(maps)
    expected = {
        "original": (5, 4), "bn_after_addition": (5, 3), "relu_before_addition": (5, 3),
        "relu_only_preactivation": (4, 3), "full_preactivation": (4, 2),
    }  # fmt: skip
    assert (kept["reference"], kept["cpp"]) == expected[unit]


@pytest.mark.parametrize("unit", UNITS)
def test_compiles_whole(unit):
    """One graph, without breaks, forward and backward."""
    shortcut = "exclusive_gating" if unit == "original" else "identity"
    module = ResidualUnit(8, 8, 2, unit=unit, shortcut=shortcut, option="A").double()
    twin = copy.deepcopy(module)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, output = twin(x), compiled(x)
    assert_same_in_float64(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    for found, parameter in zip(module.parameters(), twin.parameters(), strict=True):
        assert_same_in_float64(found.grad, parameter.grad)
