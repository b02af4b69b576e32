"""The model of passes, bytes and time: the table of the design, and what the choice makes of it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.traffic import table, units
from preact import costs

GPU = costs.GPUS["h100"]
# Forward, backward and saved maps of a two-conv unit of equal shapes, of few channels.
PASSES = {
    "eager": (17, 27, 4),
    "A": (12, 19, 4),
    "B": (12, 23, 2),
    "C": (7, 17, 2),
    "D": (5, 17, 2),
    "E": (5, 16, 2),
}


def test_passes_of_a_two_conv_unit() -> None:
    layers = units(8, 32, 16)["two-conv unit"]
    rows = {row["plan"]: row for row in table(layers, GPU, 2)}
    assert all(row["memory"] == row["passes"] for row in rows.values())
    assert {p: (r["forward"], r["backward"], r["saved"]) for p, r in rows.items()} == PASSES
    for plan, (forward, backward, _) in PASSES.items():
        every = costs.unit_forward(plan, layers) + costs.unit_backward(plan, layers)
        assert sum(kernel.passes for kernel in every) == forward + backward
    # Three directions of each convolution, two operations a product, in every plan.
    one = 2 * 8 * 16 * 16 * 32 * 32 * 9
    assert {round(float(row["gigaoperations"]) * 1e9) for row in rows.values()} == {6 * one}


def test_a_pass_from_a_cache_counts_by_the_letter_alone() -> None:
    """A wider unit forms its pending gradient once: a program loads what it has just stored."""
    layers = units(8, 64, 16)["two-conv unit"]
    narrow = {row["plan"]: row for row in table(units(8, 32, 16)["two-conv unit"], GPU, 2)}
    for row in table(layers, GPU, 2):
        more = 1 if row["plan"] == "E" else 0
        assert row["memory"] == narrow[row["plan"]]["passes"]
        assert row["passes"] == row["memory"] + more
        assert row["backward"] == narrow[row["plan"]]["backward"] + more
    pending, steps = (
        costs.own_backward(units(8, channels, 16)["two-conv unit"][0], pending=True)[0]
        for channels in (64, 32)
    )
    assert pending.returned == layers[0].output
    assert steps.returned == 0
    assert pending.seconds(GPU, 2) == pending._replace(returned=0).seconds(GPU, 2)


@pytest.mark.parametrize(
    ("kernel", "channels", "out_channels", "stride", "at_steps"),
    [
        (3, 32, 32, 1, True),
        (3, 64, 64, 1, False),
        (3, 16, 32, 1, False),
        (3, 16, 16, 2, False),
        (1, 256, 256, 1, True),
        (1, 512, 512, 1, False),
        (1, 64, 128, 2, True),
        (5, 16, 16, 1, False),
    ],
)
def test_a_gradient_is_formed_at_steps_where_memory_takes_longer(
    kernel, channels, out_channels, stride, at_steps
) -> None:
    layer = costs.layer(
        (8, channels, 32, 32), (out_channels, channels, kernel, kernel), (stride,) * 2,
        (kernel // 2,) * 2,
    )  # fmt: skip
    assert layer.forms_at_steps == at_steps


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
