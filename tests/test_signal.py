"""The paper's equations 3 to 8 on networks that run on the fused kernels, to rounding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.records import read_records
from benchmarks.signal import CASES
from benchmarks.signal_flow import measure
from preact.models import PreResNet, shortcuts

from .tolerances import NETWORK_FLOAT64


def network(unit: str, shortcut: shortcuts.Shortcut, layers: str = "basic") -> PreResNet:
    model = PreResNet(
        layers, [4, 3], [4, 8], 10, stem_channels=4, unit=unit, shortcut=shortcut, option="A"
    ).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 and "weighing" not in name:
                value.uniform_(0.5, 1.5)
    return model


def run(model: PreResNet):
    return measure(model, torch.randn(3, 3, 8, 8).double(), torch.randint(0, 10, (3,)))


@pytest.mark.parametrize("unit", ["full_preactivation", "relu_only_preactivation"])
@pytest.mark.parametrize("name", CASES)
def test_both_identities_hold_for_every_shortcut(name, unit):
    _, stages = run(network(unit, CASES[name]))
    assert len(stages) == 2
    for stage in stages:
        assert stage.signal_error < NETWORK_FLOAT64
        assert stage.gradient_error < NETWORK_FLOAT64


@pytest.mark.parametrize("layers", ["bottleneck", "one_layer"])
def test_other_branches(layers):
    _, stages = run(network("full_preactivation", shortcuts.identity(), layers))
    assert max(max(s.signal_error, s.gradient_error) for s in stages) < NETWORK_FLOAT64


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.5, 1.1])
def test_the_direct_term_is_the_last_gradient_times_the_factors(scale):
    """Equation 8: exactly the product of the lambdas of the units that it passes."""
    signals, _ = run(network("full_preactivation", shortcuts.constant_scaling(scale, 1.0)))
    first = signals[1:4]  # stage 0 without its first unit
    for at, following in itertools.pairwise(first):
        assert math.isclose(at.direct, scale * following.direct, rel_tol=1e-12)
    assert math.isnan(signals[4].direct)


def test_an_activation_after_the_addition_breaks_them():
    for unit in ("original", "bn_after_addition"):
        _, stages = run(network(unit, shortcuts.identity()))
        assert min(stage.signal_error for stage in stages) > 0.01
        assert min(stage.gradient_error for stage in stages) > 0.01


def test_measuring_leaves_no_trace():
    model = network("full_preactivation", shortcuts.identity())
    run(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_command(tmp_path):
    result = CliRunner().invoke(
        main, ["signal", "--quick", "--output", str(tmp_path)], catch_exceptions=False
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = read_records(tmp_path / "quick_signal_preresnet20_full_preactivation.csv")
    assert len(rows) == len(CASES) * 9
    assert (tmp_path / "quick_signal_preresnet20_full_preactivation.png").stat().st_size > 0
    direct = {(row["shortcut"], row["unit"]): float(row["direct"]) for row in rows}
    for name, scale in (("identity", 1.0), ("lambda 0.5", 0.5), ("lambda 1.1", 1.1)):
        assert math.isclose(direct[name, "1"], scale * direct[name, "2"], rel_tol=1e-6)
