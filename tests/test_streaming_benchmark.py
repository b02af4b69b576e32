"""The passes beside copy_: maps by the caches' sizes, a row for each op, ratios of bytes."""

from __future__ import annotations

import math

import pytest
import torch
from click.testing import CliRunner

from benchmarks import streaming
from benchmarks.__main__ import main
from benchmarks.records import read_records
from preact.backends import available


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_fit_their_level(monkeypatch, dtype):
    caches = 4 * 2**20
    monkeypatch.setattr(streaming, "_l2_bytes", lambda: caches)
    for maps in streaming.OPS.values():
        within = streaming.map_shape("L2", maps, 64, 32, dtype)
        beyond = streaming.map_shape("L3", maps, 64, 32, dtype)
        assert max(maps, 2) * math.prod(within) * dtype.itemsize <= caches // 2
        assert math.prod(beyond) * dtype.itemsize == 2 * caches
    assert streaming.map_shape("L2", 2, 2048, 512, dtype)[0] == 1  # an image at least


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming.preact, "retain_freed_memory", lambda: None)
    arguments = ["streaming", "--dtypes", "bfloat16", "--layouts", "nchw", "--levels", "L2"]
    result = CliRunner().invoke(
        main, [*arguments, "--channels", "8", "--size", "7", "--rounds", "1", "--output", tmp_path]
    )
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = read_records(path)
    assert [row["op"] for row in rows] == list(streaming.OPS)
    for row in rows:
        moved = streaming.OPS[row["op"]] / 2  # a copy moves two maps
        ratio = moved * float(row["copy_us"]) / float(row["us"])
        assert float(row["ratio"]) == pytest.approx(ratio)
        assert float(row["call_us"]) > 0
    refused = CliRunner().invoke(main, ["streaming", "--levels", "L1"])
    assert refused.exit_code == 2
    assert "L1" in refused.output
