"""Each barrier, wait and bounds test of the matrix kernels is needed: without it a test fails.

One program holds every edit of a kernel behind a switch, and each runs on small cases with one
switched on. ``-s`` shows how each was caught.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from . import cuda_emulation as emulation
from . import test_cuda_conv2d as conv2d
from .cuda_emulation.mutations import (
    Mutation,
    barriers,
    barriers_removed,
    outcomes,
    switched,
    without,
    without_barrier,
)

pytestmark = pytest.mark.skipif(
    bool(emulation.why_not()), reason=emulation.why_not() or "emulation"
)

FORWARD, INPUT, WEIGHT = "forward", "backward_input", "backward_weight"
FILES = {
    FORWARD: "batch_norm_relu_conv2d",
    INPUT: "batch_norm_relu_conv2d_backward_input",
    WEIGHT: "batch_norm_relu_conv2d_backward_weight",
}
# Two tiles of rows, of columns and of depth, none of them whole; strides and addresses off
# alignment; a single value; a last step that reads what the epilogue then overwrites; rows enough
# for several splits.
SHAPES = [
    (1, 1, 1, 1, 1, (1, 1), 0),
    (1, 9, 17, 40, 16, (2, 2), 1),
    (1, 9, 17, 37, 67, (1, 1), 0),
    (1, 9, 17, 136, 72, (1, 1), 0),
    (3, 13, 17, 16, 8, (1, 1), 0),
]
WIDE, NARROW = ("half", torch.bfloat16, 128), ("half", torch.float16, 64)

ROWS, COLUMNS = "rows[pass] >= 0 && column < last", "valid && column + e < last"
MUTATIONS = [
    # The main loop and the walk over its result
    *(without_barrier(FORWARD, "gemm", nth) for nth in range(3)),
    *(without(FORWARD, "gemm", "cp_async_commit();", nth) for nth in range(2)),
    without(FORWARD, "gemm", "cp_async_wait<kStages - 2>();"),
    Mutation(INPUT, "gemm", "step < steps", "true"),
    Mutation(FORWARD, "gemm", "next < steps", "true"),
    Mutation(FORWARD, "gemm", "row >= rows", "false"),
    Mutation(INPUT, "gemm", "h % stride_h != 0", "false"),
    Mutation(INPUT, "gemm", "w % stride_w != 0", "false"),
    Mutation(FORWARD, "gemm", "c < channels", "true"),
    # Tiles and their rows' ends
    Mutation(INPUT, "gemm_tile", ROWS, "column < last"),
    Mutation(INPUT, "gemm_tile", ROWS, "rows[pass] >= 0"),
    Mutation(FORWARD, "gemm_tile", "matrix.vector", "true"),
    Mutation(FORWARD, "gemm_tile", COLUMNS, "valid"),
    Mutation(FORWARD, "gemm_tile", COLUMNS, "column + e < last"),
    *(Mutation(FORWARD, "element", "e < count", "true", nth) for nth in range(2)),
    *(Mutation(FORWARD, "element", "(vector)", "true", nth) for nth in range(2)),
    # Sums of columns
    *(
        without_barrier(op, "column_sums", nth)
        for nth, op in enumerate((FORWARD, INPUT, FORWARD, FORWARD))
    ),
    Mutation(FORWARD, "column_sums", "added == 0", "false"),
    Mutation(FORWARD, "column_sums", "left < kBlockM", "false"),
    *(
        Mutation(op, "column_sums", test, "true", nth)
        for test in ("lane < kEights", "column < kSlabColumns")
        for nth, op in enumerate((FORWARD, INPUT))
    ),
    *(
        Mutation(op, "column_sums", "column < columns", "true", nth)
        for nth, op in enumerate((FORWARD, INPUT, FORWARD, FORWARD, FORWARD, INPUT, INPUT))
    ),
    # The forward
    without_barrier(FORWARD, FILES[FORWARD], 0),
    Mutation(FORWARD, FILES[FORWARD], "row < p.out_channels", "true"),
    Mutation(FORWARD, FILES[FORWARD], "p.rows - first_row < kBlockM", "false"),
    Mutation(FORWARD, FILES[FORWARD], "e < count", "true"),
    Mutation(FORWARD, FILES[FORWARD], "row >= limit", "false"),
    Mutation(FORWARD, FILES[FORWARD], "count <= 0", "false"),
    # The gradient of the input
    *(without_barrier(INPUT, FILES[INPUT], nth) for nth in range(2)),
    Mutation(INPUT, FILES[INPUT], "row < depth", "true"),
    Mutation(INPUT, FILES[INPUT], "p.rows - first_row < kBlockM", "false"),
    Mutation(INPUT, FILES[INPUT], "row >= limit", "false"),
    Mutation(INPUT, FILES[INPUT], "count <= 0", "false"),
    Mutation(INPUT, "pending", "c < channels", "true"),
    Mutation(INPUT, "pending", "rows[pass] < 0", "false"),
    # The gradient of the weight
    *(without_barrier(WEIGHT, FILES[WEIGHT], nth) for nth in range(2)),
    Mutation(WEIGHT, FILES[WEIGHT], "p.rows - begin < p.rows_per_split", "false"),
    *(Mutation(WEIGHT, FILES[WEIGHT], "row < end", "true", nth) for nth in range(2)),
    Mutation(WEIGHT, FILES[WEIGHT], "o >= out_channels", "false"),
    Mutation(WEIGHT, FILES[WEIGHT], "count <= 0", "false"),
    *(Mutation(WEIGHT, FILES[WEIGHT], "element < elements", "true", nth) for nth in range(2)),
    Mutation(WEIGHT, FILES[WEIGHT], "lane == 0", "true"),
]


class Cases:
    """Prepared cases of each op, the smallest first, and what checks them."""

    def __init__(self, folder: Path) -> None:
        self.every: dict[str, dict[Path, tuple]] = {op: {} for op in FILES}
        for op, found in self.every.items():
            for index, shape in enumerate(SHAPES):
                for kind, pending in ((NARROW, False), (WIDE, False), (NARROW, True)):
                    if pending and op == FORWARD:
                        continue
                    case, tensors = conv2d.make(kind, shape, op, pending=pending)
                    place = folder / f"{op}-{index}-{kind[2]}-{pending}"
                    found[emulation.prepare(place, case)] = (kind, tensors, shape[5])

    def outcome(self, program: Path, op: str, folder: Path, mutation: int = -1) -> str:
        """Empty where the op passes, else how the first case that does not fails."""
        for case, (kind, tensors, stride) in self.every[op].items():
            place = Path(shutil.copytree(case, folder / case.name))
            result = emulation.run(program, [place], mutation)
            if result.returncode:
                return next(line for line in result.stderr.splitlines() if line.strip("= "))
            try:
                conv2d.check(place, kind, op, tensors, stride)
            except AssertionError as error:
                return str(error).splitlines()[0]
        return ""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    csrc = switched(MUTATIONS, tmp_path_factory.mktemp("switched"))
    return emulation.compile_program(FILES[FORWARD], csrc, define=["TWO_KINDS"])


@pytest.fixture(scope="module")
def caught(cases, program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")

    def one(number: int, mutation: Mutation) -> str:
        return cases.outcome(program, mutation.op, folder / str(number), number)

    with outcomes(MUTATIONS, one) as results:
        yield results


@pytest.mark.parametrize("op", FILES)
def test_without_a_mutation_it_passes(op, cases, program, tmp_path):
    assert cases.outcome(program, op, tmp_path) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation, caught):
    how = caught[mutation].result()
    assert how, "nothing noticed the change"
    print(f"\n{mutation.file}: {mutation.old!r} -> {mutation.new!r}\n  caught: {how}")


def test_every_barrier_is_tried():
    assert barriers(FILES.values()) == barriers_removed(MUTATIONS)
