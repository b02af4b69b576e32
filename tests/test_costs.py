"""The model of passes, bytes and time: the table of the design, and what the choice makes of it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.traffic import table, units
from preact import costs

# Forward, backward and saved maps of a two-conv unit of equal shapes.
PASSES = {
    "eager": (17, 27, 4),
    "A": (12, 19, 4),
    "B": (12, 23, 2),
    "C": (7, 17, 2),
    "D": (5, 17, 2),
    "E": (5, 16, 2),
}


def test_passes_of_a_two_conv_unit() -> None:
    layers = units(8, 64, 16)["two-conv unit"]
    rows = {row["plan"]: row for row in table(layers, costs.GPUS["h100"], 2)}
    assert {p: (r["forward"], r["backward"], r["saved"]) for p, r in rows.items()} == PASSES
    for plan, (forward, backward, _) in PASSES.items():
        every = costs.unit_forward(plan, layers) + costs.unit_backward(plan, layers)
        assert sum(kernel.passes for kernel in every) == forward + backward
    # Three directions of each convolution, two operations a product, in every plan.
    one = 2 * 8 * 16 * 16 * 64 * 64 * 9
    assert {round(float(row["gigaoperations"]) * 1e9) for row in rows.values()} == {6 * one}


def test_bytes_are_maps_and_weights() -> None:
    layer = costs.layer((2, 3, 8, 8), (5, 3, 3, 3), (2, 2), (1, 1))
    (kernel,) = costs.own_forward(layer)
    assert layer.output == 2 * 5 * 4 * 4
    assert kernel.bytes(4) == 4 * (2 * 3 * 8 * 8 + 2 * 5 * 4 * 4 + 5 * 3 * 3 * 3)


def test_time_is_the_longer_of_moving_and_multiplying() -> None:
    gpu = costs.Gpu("none", 80, 1e12, 1e14, 1e14, 1e13)
    moves = costs.Kernel("moves", (10**9,), ())
    assert moves.seconds(gpu, 2) == pytest.approx(2e-3 / costs.MEMORY_SHARE + costs.LAUNCH)
    multiplies = costs.Kernel("multiplies", (1,), (), 10**12)
    assert multiplies.seconds(gpu, 2) == pytest.approx(0.02 / costs.PRODUCT_SHARE + costs.LAUNCH)
    assert multiplies.seconds(gpu, 4, tf32=False) > 9 * multiplies.seconds(gpu, 4)


@pytest.mark.parametrize(("capability", "name"), [(75, "a100"), (87, "rtx3090"), (103, "b200")])
def test_an_unlisted_device_is_judged_as_the_newest_older_one(capability: int, name: str) -> None:
    assert costs.nearest_gpu(capability) == costs.GPUS[name]


def test_the_command_says_that_it_is_a_model() -> None:
    result = CliRunner().invoke(main, ["traffic", "--gpu", "a100", "--channels", "64"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("MODEL, not a measurement: A100")
    assert "two-conv unit" in result.output
    assert "bottleneck unit" in result.output
