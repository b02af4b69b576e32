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
        for limit in ("moves", "computes"):
            assert float(row[limit]) == pytest.approx(
                moved * float(row["copy_us"]) / float(row[f"{limit}_us"])
            )
        assert float(row["of_computes"]) == pytest.approx(
            float(row["ratio"]) / float(row["computes"])
        )
        assert row["verdict"] == streaming.verdict(row)
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
    how = (ahead, False)
    assert word_of(ops.stats(x, *how)[0]) == word(bits[0])
    assert word_of(ops.reduce(grad, x, *norm, *how)[0]) == word(bits[0] ^ bits[1])
    assert torch.equal(ops.apply(x, *norm, *how).view(integers), bits[0])
    moved = ops.backward(grad, x, *norm[:4], vector, vector, skip, 1e-5, *how)
    assert torch.equal(moved.view(integers), bits[0] ^ bits[1] ^ bits[2])
    assert torch.equal(ops.add(x, skip, *how)[0].view(integers), bits[0] ^ bits[2])


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_limit_computes_what_its_pass_does(dtype, ahead):
    """Of a map with one channel, where nothing but bfloat16's rounding is left out."""
    ops = limits.operations(streaming.vectors())
    torch.manual_seed(0)
    # Whole blocks, and no more than one thread is asked to do.
    grad, x, skip = (torch.randn(2, 1, 64, 128).to(dtype) for _ in range(3))
    norm = tuple(torch.tensor([value]) for value in (0.25, 1.5, 0.75, -0.125))
    sums = tuple(torch.tensor([value]) for value in (0.5, 0.0625))
    how = (ahead, True)
    mean, var, weight, bias = norm
    scale = weight * (var + 1e-5).rsqrt()

    def same(found: torch.Tensor, exact: torch.Tensor) -> None:
        # Cut off to 8 bits, or not at all.
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=1e-6)

    def same_sums(found: torch.Tensor, *exact: torch.Tensor) -> None:
        total = sum(float(one.double().sum()) for one in exact)
        assert float(found[0]) == pytest.approx(total, rel=1e-4)

    centred = x.float() - mean
    z = centred * scale + bias
    dz = torch.where(z > 0, grad.float(), 0)
    total = x.float() + skip.float()
    same(ops.apply(x, *norm, 1e-5, *how), z.relu())
    same(
        ops.backward(grad, x, *norm, *sums, skip, 1e-5, *how),
        scale * dz + centred * sums[0] + sums[1] + skip.float(),
    )
    same_sums(ops.stats(x, *how)[0], x.float(), x.float().square())
    same_sums(ops.reduce(grad, x, *norm, 1e-5, *how)[0], dz, dz * centred)
    written, word, _ = ops.add(x, skip, *how)
    same(written, total)
    same_sums(word, total, total.square())


def test_verdict():
    """A pass may be ahead of the plain loops: what it reaches counts."""
    assert streaming.verdict({"ratio": 0.9, "computes": 0.8}) == "met"
    assert streaming.verdict({"ratio": 0.7, "computes": 0.8}) == "out of reach"
    assert streaming.verdict({"ratio": 0.7, "computes": 0.9}) == "missed"
