"""Every kernel on every architecture, every configuration, every type: what the code is.

A covering part of ``python -m tests.evidence.matrix``, which compiles everything.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from preact.triton_kernels.batch_norm_stats import batch_norm_stats

from .evidence import calls, interpreter
from .evidence.binaries import ARCHITECTURES, assert_widest, compile_launch
from .evidence.launches import record
from .evidence.matrix import Case, check

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)

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


@pytest.mark.parametrize("case", covering(), ids=str)
def test_every_configuration(case: Case) -> None:
    """Sound, with wide accesses or tensor cores; the merging kernels once for each architecture."""
    seen = set()
    for launch in case.launches():
        small = "BLOCK_R" not in launch.bound() and "BLOCK_M" not in launch.bound()
        if small and (launch.name in seen or case.op not in ("batch_norm_stats", "weight")):
            continue
        seen.add(launch.name)
        check(case, launch)


@pytest.mark.parametrize("case", calls.NARROWER, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_written_default_of_narrow_layers(arch: int, case: calls.Convolution) -> None:
    for op in ("forward", "input", "weight"):
        of = Case(arch, op, case, torch.bfloat16)
        check(of, of.launches()[0])


def test_the_covering_part_leaves_nothing_out() -> None:
    cases = covering()
    for op in STREAMING + CONVOLUTION:
        own = [case for case in cases if case.op == op]
        assert {case.arch for case in own} == set(ARCHITECTURES)
        assert {case.dtype for case in own} == {torch.float32, torch.bfloat16, torch.float16}
        assert len({case.of for case in own}) == 2, "both layouts, or both kernel sizes"


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
