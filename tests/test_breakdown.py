"""The breakdown of a step: every operation has one part, and the parts make up the step."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks import breakdown
from benchmarks.__main__ import main
from benchmarks.networks import NETWORKS
from benchmarks.records import read_records


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("preact::residual_units_backward", "fused"),
        ("preact::batch_norm_relu_conv2d_into", "fused"),
        ("preact::batch_norm_relu_backward_apply", "passes"),
        ("preact::update_running_stats", "passes"),
        ("aten::mkldnn_convolution", "library convolutions"),
        ("aten::convolution_backward", "library convolutions"),
        ("aten::_foreach_add_", "other operations"),
        ("ResidualUnitBackward", None),
    ],
)
def test_part_of(name, part):
    assert breakdown.part_of(name) == part


def test_parts_make_up_the_step():
    row = breakdown.measure(NETWORKS["preresnet20"], "float32", 1)
    parts = sum(float(row[part]) for part in breakdown.PARTS)
    assert parts == pytest.approx(row["step"])
    assert row["floor"] > 0
    assert row["fused"] + row["library convolutions"] > 0


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown.preact, "retain_freed_memory", lambda: None)
    arguments = ["breakdown", "--networks", "preresnet20", "--dtypes", "float32", "--rounds", "1"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (row,) = read_records(tmp_path / "breakdown.csv")
    assert row["network"] == "preresnet20"
    assert float(row["step / floor"]) > 0
    refused = CliRunner().invoke(main, ["breakdown", "--networks", "nothing"])
    assert refused.exit_code == 2
    assert "nothing" in refused.output
