"""The emulated instructions against the tables of the PTX ISA, written out lane by lane.

A *group* is a lane / 4, a *member* a lane % 4.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import cuda_emulation as emulation

pytestmark = pytest.mark.skipif(
    bool(emulation.why_not()), reason=emulation.why_not() or "emulation"
)

LANES = range(32)


def a_16816(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of A, for mma.m16n8k16 with 16-bit types."""
    group, member = lane // 4, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, member * 2 + i % 2 + (8 if i >= 4 else 0)


def b_16816(lane: int, i: int) -> tuple[int, int]:
    group, member = lane // 4, lane % 4
    return member * 2 + i % 2 + (8 if i >= 2 else 0), group


def a_1688(lane: int, i: int) -> tuple[int, int]:
    """For mma.m16n8k8 with tf32."""
    group, member = lane // 4, lane % 4
    return (group if i in (0, 2) else group + 8), (member if i < 2 else member + 4)


def b_1688(lane: int, i: int) -> tuple[int, int]:
    group, member = lane // 4, lane % 4
    return (member if i == 0 else member + 4), group


def c_16x8(lane: int, i: int) -> tuple[int, int]:
    """The sums of either shape."""
    group, member = lane // 4, lane % 4
    return (group if i < 2 else group + 8), member * 2 + i % 2


def registers(matrix: Tensor, place, elements: int) -> Tensor:
    """What each lane holds of a matrix, ``[32, elements]``."""
    return torch.stack([matrix[place(lane, i)] for lane in LANES for i in range(elements)]).view(
        32, elements
    )


def emulate(folder, case: dict, dtype: torch.dtype) -> Tensor:
    place = emulation.prepare(folder / "case", {"seeds": 3, **case})
    result = emulation.run(emulation.compile_program("fragments"), [place])
    assert result.returncode == 0, result.stderr
    return emulation.read(place / "result.out", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_mma(dtype, tmp_path):
    """Small integers, so that every sum is exact in any order."""
    depth, a_place, b_place, a_elements, b_elements = (
        (8, a_1688, b_1688, 4, 2) if dtype == torch.float32 else (16, a_16816, b_16816, 8, 4)
    )
    a, b = (torch.randint(-9, 10, size).to(dtype) for size in ((16, depth), (depth, 8)))
    c = torch.randint(-99, 100, (16, 8)).float()
    name = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    case = {
        "op": f"mma_{name}",
        "a": registers(a, a_place, a_elements),
        "b": registers(b, b_place, b_elements),
        "c": registers(c, c_16x8, 4),
    }
    result = emulate(tmp_path, case, torch.float32).view(32, 4)
    assert torch.equal(result, registers(a.float() @ b.float() + c, c_16x8, 4))


def test_tf32_reads_ten_bits_of_mantissa(tmp_path):
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[3, 2], b[2, 5] = 1 + 2.0**-10 + 2.0**-11, 1.0
    case = {
        "op": "mma_tf32",
        "a": registers(a, a_1688, 4),
        "b": registers(b, b_1688, 2),
        "c": torch.zeros(32, 4),
    }
    expected = torch.zeros(16, 8)
    expected[3, 5] = 1 + 2.0**-10
    result = emulate(tmp_path, case, torch.float32).view(32, 4)
    assert torch.equal(result, registers(expected, c_16x8, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, tmp_path):
    """Register i of a lane: two neighbours of a row of matrix i, whose rows lanes 8i… name."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    op = "ldmatrix_trans" if transposed else "ldmatrix"
    result = emulate(tmp_path, {"op": op, "rows": matrices}, torch.int16).view(32, 4, 2)
    for lane in LANES:
        for i in range(4):
            read = matrices[i].T if transposed else matrices[i]
            expected = read[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert torch.equal(result[lane, i], expected), (lane, i)


def test_cp_async(tmp_path):
    """A group is there after a wait that leaves fewer under way; what is not valid is zero."""
    source = torch.arange(1, 2 * 32 * 4 + 1, dtype=torch.int32).view(2, 32, 4)
    valid = 21
    case = {"op": "cp_async", "source": source, "valid": valid}
    first, early, second = emulate(tmp_path, case, torch.int32).view(3, 32, 4)
    for group, result in ((source[0], first), (source[1], second)):
        assert torch.equal(result[:valid], group[:valid])
        assert not result[valid:].any()
    assert (early == -1).all(), "what is under way must not be there, so that a missing wait shows"


def test_to_tf32_rounds_to_nearest_ties_away(tmp_path):
    step = 2.0**-10
    halves = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0, 1.5, -0.5, -1.5]) * step
    values = torch.cat([1 + halves, -1 - halves, 3 * (1 + halves), torch.full((8,), torch.inf)])
    result = emulate(tmp_path, {"op": "to_tf32", "values": values}, torch.float32)
    steps = values.abs().double() / (step * 2.0 ** values.abs().log2().floor().double())
    expected = values.sign() * (steps + 0.5).floor() * step * 2.0 ** values.abs().log2().floor()
    expected = torch.where(values.isinf(), values.double(), expected)
    assert torch.equal(result.double(), expected)
