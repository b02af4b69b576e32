"""Every kernel on every architecture, every configuration, every type: what the code is.

A covering part of ``python -m tests.evidence.matrix``, whose table is committed as
``benchmarks/results/binaries.csv``.
"""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("triton")

from preact import costs
from preact.triton_kernels.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from preact.triton_kernels.batch_norm_relu_conv2d_backward_input import (
    batch_norm_relu_conv2d_backward_input,
)
from preact.triton_kernels.batch_norm_stats import batch_norm_stats

from .evidence import calls, interpreter, launches, matrix, report
from .evidence.binaries import ARCHITECTURES, COUNTED, SHARED_LIMIT, assert_widest, compile_launch
from .evidence.launches import Launch, record
from .evidence.limits import floor, limits
from .evidence.matrix import Case, check, every_case

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)

counted = pytest.mark.skipif(
    not COUNTED,
    reason="what an older Triton's compiler makes of a tile is not what the table counts",
)
TABLE = report.TABLE
STREAMING = list(calls.streaming(calls.SHAPE, torch.float32, True))
CONVOLUTION = list(calls.convolution(calls.WIDE[0], torch.float32))


def covering() -> list[Case]:
    """Each op with each architecture and each type, the layouts and convolutions in turn."""
    turn = list(zip(ARCHITECTURES, [torch.bfloat16, torch.float16, torch.float32] * 2, strict=True))
    found = [
        Case(arch, op, (index + shift) % 2 == 0, dtype)
        for shift, op in enumerate(STREAMING)
        for index, (arch, dtype) in enumerate(turn)
    ]
    for shift, op in enumerate(CONVOLUTION):
        for index, (arch, dtype) in enumerate(turn):
            case = calls.WIDE[(index + shift) % 2]
            found.append(Case(arch, op, case, dtype))
    return found


def default_of(case: Case) -> Launch:
    """What a convolution launches where nothing is measured."""
    *_, launch = (x for x in case.launches() if "BLOCK_M" in x.bound())
    return launch


@pytest.mark.parametrize("case", covering(), ids=str)
def test_configurations(case: Case) -> None:
    """Sound, with wide accesses or tensor cores: the default, and the other ones in turn.

    The merging kernels, which many ops share, with two of them.
    """
    found = case.launches()
    main = [x for x in found if "BLOCK_R" in x.bound() or "BLOCK_M" in x.bound()] or found
    *others, default = main
    turn = ARCHITECTURES.index(case.arch)
    chosen = [default, *(others[turn % len(others) :][:1] if others else [])]
    if case.op in ("batch_norm_stats", "weight"):
        chosen += [x for x in found if x.name.startswith("merge")][:1]
    for launch in chosen:
        check(case, launch)


@pytest.mark.parametrize("case", calls.NARROWER, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_written_default_of_narrow_layers(arch: int, case: calls.Convolution) -> None:
    for op in ("forward", "input", "weight"):
        of = Case(arch, op, case, torch.bfloat16)
        check(of, default_of(of))


@pytest.mark.parametrize("arch", [86, 120])
def test_the_written_default_of_narrow_layers_in_float32(arch: int) -> None:
    """Tiles that are as large as the registers allow."""
    for case in (*calls.NARROWER[:2], calls.DENSE):
        of = Case(arch, "weight", case, torch.float32)
        check(of, default_of(of))


@pytest.mark.parametrize("op", ["forward", "input"])
@pytest.mark.parametrize(
    ("arch", "dtype", "kernel_rows"),
    [(90, torch.bfloat16, 7), (90, torch.float32, 5), (120, torch.bfloat16, 7)],
)
def test_the_written_default_of_tall_kernels(
    arch: int, dtype: torch.dtype, kernel_rows: int, op: str
) -> None:
    """Three taps wide, and more rows than fit into shared memory at once."""
    outs = 32 if arch == 120 else 64
    x, out = (launches.meta(32, c, 28, 28, dtype=dtype) for c in (64, outs))
    conv_weight = launches.meta(outs, 64, kernel_rows, 3, dtype=dtype)
    prefix = (x, *(torch.empty(64, device="meta"),) * 4, 1e-5, conv_weight)
    geometry = ((1, 1), (kernel_rows // 2, 1), (1, 1), 1)
    run = {
        "forward": lambda: batch_norm_relu_conv2d(*prefix, None, None, *geometry),
        "input": lambda: batch_norm_relu_conv2d_backward_input(out, *prefix, *geometry),
    }[op]
    with calls.launched_for(arch):
        (launch,) = (found for found in record(run) if "KERNEL_ROWS" in found.bound())
    assert compile_launch(launch, arch).shared <= SHARED_LIMIT[arch] * 1024


@counted
def test_the_written_default_with_idle_columns() -> None:
    """A wide network's channels, which no tile divides."""
    of = Case(100, "forward", calls.Convolution(3, 160, 160), torch.float32)
    check(of, default_of(of))


@counted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_written_default_of_a_dense_blocks_layers(dtype: torch.dtype) -> None:
    """A forward product of 32 columns pays for little of what it normalises."""
    times = {"forward": 1.5 if dtype == torch.bfloat16 else 1.12, "input": 0.65, "weight": 0.85}
    for op, most in times.items():
        case = Case(100, op, calls.DENSE, dtype)
        launch = default_of(case)
        found = limits(matrix.row(case, launch, check(case, launch)))
        assert found.issued < most, op
        assert found.excess < (1.02 if op == "forward" else 1), op


@counted
@pytest.mark.parametrize("case", calls.LONGER, ids=str)
@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.bfloat16), (90, torch.float32)])
def test_the_written_default_of_long_sums(
    arch: int, dtype: torch.dtype, case: calls.Convolution
) -> None:
    """Their products wait for no map: what a step issues besides must be little."""
    for op in ("forward", "input", "weight"):
        of = Case(arch, op, case, dtype)
        launch = default_of(of)
        assert limits(matrix.row(of, launch, check(of, launch))).excess <= 1, op


def test_the_covering_part_leaves_nothing_out() -> None:
    cases = covering()
    for op in STREAMING + CONVOLUTION:
        own = [case for case in cases if case.op == op]
        assert {case.arch for case in own} == set(ARCHITECTURES)
        assert {case.dtype for case in own} == {torch.float32, torch.bfloat16, torch.float16}
        assert len({case.of for case in own}) == 2, "both layouts, or both kernel sizes"


def test_the_committed_table_is_whole_and_shows_no_spill() -> None:
    with TABLE.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = {(int(row["arch"]), row["maps"], row["dtype"]) for row in rows}
    architectures = sorted({arch for arch, _, _ in found})
    assert architectures == sorted(ARCHITECTURES)
    for case in every_case(architectures):
        maps = case.of
        if isinstance(maps, bool):
            maps = "channels_last" if maps else "contiguous"
        assert (case.arch, str(maps), str(case.dtype).removeprefix("torch.")) in found
    for row in rows:
        assert row["local_bytes"] == "0", row
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[int(row["arch"])] * 1024, row
        if "conv2d" in row["kernel"] and row["product"] != "ieee":
            assert float(row["instructions_per_tensor_core"]) > 0, row
            assert row["limit"] == limits(row).by, row


EXCESS = {
    "sm_80 weight_pairs 3x3 32->32 float32": 1.11,
    "sm_80 weight 3x3 64->128 /2 float32": 1.09,
    "sm_90 forward_rows 3x3 128->32 bfloat16": 1.25,
    "sm_100 weight_pairs 3x3 16->16 float32": 1.07,
    "sm_100 forward_rows 3x3 128->32 bfloat16": 1.48,
    "sm_100 forward_rows 3x3 128->32 float32": 1.11,
    "sm_100 input_rows 3x3 256->256 bfloat16": 1.17,
    "sm_100 input_rows 3x3 256->256 float32": 1.09,
    "sm_100 forward 3x3 256->256 /2 float32": 1.44,
    "sm_100 input 3x3 256->256 /2 float32": 1.03,
    "sm_100 weight_strided 3x3 256->256 /2 float32": 1.10,
    "sm_100 weight 1x1 2048->512 bfloat16": 1.07,
    "sm_100 forward 1x1 2048->512 float32": 1.17,
    "sm_100 weight 1x1 2048->512 float32": 1.32,
}
"""By how many times a loop may issue for longer than it multiplies or waits for memory, where no
smaller number was found: those that ``benchmarks/LIMITS.md`` lists."""


def test_issuing_limits_only_what_is_known() -> None:
    """What runs where nothing is measured multiplies or waits for memory for as long as it issues,
    or nearly; and but for two it waits for shared memory as long or longer."""
    found = report.issue_limited()
    assert found.keys() == EXCESS.keys()
    for name, (times, least, _) in found.items():
        assert least < times <= EXCESS[name], name
    longest = {
        report.name_of(row): limits(row).excess
        for row in report.rows()
        if row["default"] and row["limit"] == "issue"
    }
    assert longest.keys() == {
        "sm_80 weight_pairs 3x3 32->32 float32",
        "sm_100 forward_rows 3x3 128->32 bfloat16",
    }
    assert max(longest.values()) <= 1.1


def test_steps_form_a_gradient_where_they_wait_for_memory() -> None:
    """What each step forms unmeasured costs no time: the bytes of the maps take longer than it
    issues and than shared memory moves it. Both ways are there to be measured."""
    forming = [row for row in report.rows() if row["at_steps"]]
    assert {row["arch"] for row in forming if row["default"]} == set(map(str, ARCHITECTURES))
    assert any(not row["default"] for row in forming)
    for row in forming:
        of = limits(row)
        if row["default"]:
            assert max(of.issue, of.shared) <= max(of.memory, of.matrix), report.name_of(row)


def test_a_loop_that_issues_for_longer_is_found(monkeypatch) -> None:
    row = next(row for row in report.rows() if row["default"])
    longer = {**row, "loop_instructions": 100 * int(row["loop_instructions"])}
    monkeypatch.setattr(report, "rows", lambda: [longer])
    ((name, (times, least, _)),) = report.issue_limited().items()
    assert name == report.name_of(row)
    assert times > 1 > least


def test_the_committed_tables_of_limits_are_those_of_the_binaries() -> None:
    assert (TABLE.parents[1] / "LIMITS.md").read_text() == "\n".join(report.lines()) + "\n"


def test_warps_multiply_nothing_twice() -> None:
    """Each product is one warp's, but for the idle quarter of three taps beside each other."""
    for row in report.rows():
        if row["default"] and row["tensor_core_instruction"].startswith("HMMA"):
            each = int(row["warps"]) * (1024 if row["dtype"] == "float32" else 2048)
            times = int(row["loop_tensor_core"]) * each / int(row["loop_products"])
            assert times in (1, 4 / 3), report.name_of(row)


def test_what_the_instructions_need_at_least_is_less_than_they_are() -> None:
    for row in report.rows():
        assert 0 < floor(row) < limits(row).issue, report.name_of(row)


def share_of(row: dict[str, str]) -> int:
    """Place of a row's kernel in the cost model's shares; backward to the input is pending."""
    return 3 if "input" in row["kernel"] else 2 if "weight" in row["kernel"] else 0


def test_the_cost_model_counts_what_the_table_shows() -> None:
    best: dict[tuple[int, bool, int, str], float] = {}
    for row in report.rows():
        if row["dtype"] == "bfloat16" and row["maps"] in ("3x3 64->64", "3x3 64->128"):
            key = (int(row["arch"]), row["kernel"].endswith("_rows"), share_of(row), row["maps"])
            best[key] = max(best.get(key, 0.0), limits(row).share)
    assert {arch for arch, *_ in best} == set(ARCHITECTURES)
    for (arch, by_rows, index, maps), share in best.items():
        other = min(share, best[arch, by_rows, index, "3x3 64->64"])
        least = min(other, best[arch, by_rows, index, "3x3 64->128"])
        taken = costs.ISSUE_SHARE.get((arch, by_rows), (1.0,) * 4)[index]
        assert taken == pytest.approx(least, abs=0.06), f"sm_{arch} {by_rows} {index} {maps}"


@pytest.mark.parametrize(
    ("arch", "instruction", "count", "block", "clocks"),
    [
        (80, "HMMA.16816.F32.BF16", 48, "64x64x32", 3 * 64 * 64 * 32 / 1024),
        (90, "HGMMA.64x64x16.F32.BF16", 6, "128x64x32", 3 * 128 * 64 * 32 / 2048),
        (100, "UTCHMMA", 6, "128x64x32", 6 * 64 / 2),
        (100, "UTCHMMA", 6, "64x64x32", 6 * 64 / 2),
    ],
)
def test_clocks_of_a_matrix_unit(arch, instruction, count, block, clocks) -> None:
    """Every product once at the peak rate; on sm_100 64 rows take as long as 128."""
    m, n, k = map(int, block.split("x"))
    row = {
        "arch": arch, "warps": 8, "kernel": "batch_norm_relu_conv2d_rows", "dtype": "bfloat16",
        "tensor_core_instruction": instruction, "block": block, "loop_products": 3 * m * n * k,
        "loop_tensor_core": count, "loop_instructions": 100, "forming_instructions": "",
        "loop_shared_bytes": 0, "maps": "3x3 64->64", "at_steps": "",
    }  # fmt: skip
    found = limits(row)
    assert found.matrix == clocks
    assert found.issue == 200
    twice = limits({**row, "dtype": "float32", "loop_tensor_core": 2 * count})
    assert twice.matrix == 2 * clocks


@pytest.mark.parametrize("at_steps", ["", "yes"])
def test_the_loop_that_stores_a_pending_gradient_counts(at_steps: str) -> None:
    rows = (r for r in report.rows() if r["forming_instructions"])
    row = next(r for r in rows if r["at_steps"] == at_steps)
    without = limits({**row, "forming_instructions": ""})
    assert limits(row).issue > without.issue


@counted
def test_a_formed_gradient_needs_few_instructions() -> None:
    """Backward to the input without a pending gradient, which the table has with one."""
    out = launches.meta(32, 128, 28, 28, dtype=torch.bfloat16)
    weight = launches.meta(128, 128, 3, 3, dtype=torch.bfloat16)
    vector = torch.empty(128, device="meta")
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    for arch in (90, 100):
        with calls.launched_for(arch):
            (launch, *_) = record(
                lambda: calls.batch_norm_relu_conv2d_backward_input(
                    out, out, *(vector,) * 4, 1e-5, weight, *geometry
                )
            )
        of = Case(arch, "input", calls.Convolution(3, 128, 128), torch.bfloat16)
        assert limits(matrix.row(of, launch, check(of, launch))).by != "issue"


@pytest.mark.parametrize("op", STREAMING)
def test_images_whose_size_divides_by_four(op: str) -> None:
    launch = record(calls.streaming(calls.NARROW, torch.float16, False)[op])[0]
    assert_widest(compile_launch(launch, 90), launch, 8)


def test_an_unaligned_view_is_noticed() -> None:
    """The check can fail: a map that begins at an odd element moves two bytes at a time."""
    x = torch.empty(8 * 64 * 49 + 1, dtype=torch.float16, device="meta")[1:].view(8, 64, 7, 7)
    launch = record(lambda: batch_norm_stats(x))[0]
    with pytest.raises(AssertionError):
        assert_widest(compile_launch(launch, 90), launch, 16)
