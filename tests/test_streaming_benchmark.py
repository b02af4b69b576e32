"""The passes beside copy_: maps by the caches' sizes, a row for each op, ratios of bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import limits, streaming
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
        assert float(row["limit"]) == pytest.approx(
            moved * float(row["copy_us"]) / float(row["limit_us"])
        )
        assert float(row["of_limit"]) == pytest.approx(float(row["ratio"]) / float(row["limit"]))
    refused = CliRunner().invoke(main, ["streaming", "--levels", "L1"])
    assert refused.exit_code == 2
    assert "L1" in refused.output


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 5, 7, 9), (4, 64, 32, 32)], ids=str)
def test_a_limit_moves_every_byte(shape, dtype, ahead):
    """The exclusive or of all maps, or of all words read, is what comes back."""
    ops = limits.operations(streaming.vectors())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = [torch.randint(-(2**15), 2**15, shape).to(integers) for _ in range(3)]
    x, grad, skip = (map.view(dtype) for map in bits)
    vector = torch.ones(shape[1])

    def word(*maps: torch.Tensor) -> int:
        data = b"".join(map.numpy().tobytes() for map in maps)
        words = np.frombuffer(data + bytes(-len(data) % 4), np.uint32)
        return int(np.bitwise_xor.reduce(words))

    def word_of(result: torch.Tensor) -> int:
        return int(result.view(torch.int32)[0]) & 0xFFFFFFFF

    norm = (vector, vector, vector, vector, 1e-5)
    assert word_of(ops.stats(x, ahead)[0]) == word(bits[0])
    assert word_of(ops.reduce(grad, x, *norm, ahead)[0]) == word(bits[0] ^ bits[1])
    assert torch.equal(ops.apply(x, *norm, ahead).view(integers), bits[0])
    moved = ops.backward(grad, x, *norm[:4], vector, vector, skip, 1e-5, ahead)
    assert torch.equal(moved.view(integers), bits[0] ^ bits[1] ^ bits[2])
    assert torch.equal(ops.add(x, skip, ahead)[0].view(integers), bits[0] ^ bits[2])
