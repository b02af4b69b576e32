"""Each barrier and bounds test of the streaming kernels is needed: without it a test fails.

The program made of a mutated copy must crash, report a dependence on the threads' order, or give a
wrong result. ``-s`` shows how each mutation was caught.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import cuda_emulation
from .cuda_emulation import CSRC, compile_program, prepare, run
from .cuda_emulation.mutations import (
    Mutation,
    barriers,
    barriers_removed,
    mutate,
    outcomes,
    without_barrier,
)
from .cuda_emulation.streaming import OPS, samples
from .test_cuda_streaming import results_of

pytestmark = pytest.mark.skipif(
    cuda_emulation.why_not() != "", reason=cuda_emulation.why_not() or "emulation"
)

STATS, RELU, ADD = "batch_norm_stats", "batch_norm_relu", "identity_add"
REDUCE, APPLY = "batch_norm_relu_backward_reduce", "batch_norm_relu_backward_apply"

MUTATIONS = [
    without_barrier(RELU, "channel_table", 0),
    without_barrier(STATS, "two_sums", 0),
    without_barrier(REDUCE, "two_sums", 0),
    without_barrier(STATS, "two_sums", 1),
    # How a map is cut
    Mutation(RELU, "sweep", "phase == 0 && map.channels % kVectorSize == 0", "phase == 0"),
    Mutation(RELU, "sweep", "g.vector = phase == 0 && ", "g.vector = "),
    Mutation(RELU, "sweep", "g.vector = phase >= 0;", "g.vector = true;"),
    Mutation(
        STATS,
        "sweep",
        "begin_ + g.chunk < g.slots ? begin_ + g.chunk : g.slots",
        "begin_ + g.chunk",
    ),
    Mutation(ADD, "sweep", "if (!more()) return slot;", ""),
    Mutation(
        RELU, "sweep", "lanes_ = static_cast<int>(left < kSize ? left : kSize)", "lanes_ = kSize"
    ),
    Mutation(RELU, "sweep", "start < 0 ? -start : 0", "0"),
    Mutation(RELU, "sweep", "static_cast<int>(left < kSize ? left : kSize)};", "kSize};"),
    Mutation(STATS, "sweep", "at > last ? last : at", "at"),
    Mutation(STATS, "sweep", "inside < 0 ? 0 : ", ""),
    Mutation(STATS, "sweep", "inside < geometry_.spatial ? inside : geometry_.spatial", "inside"),
    Mutation(RELU, "sweep", "if (slot_ >= geometry_.plane_slots)", "if (false)"),
    Mutation(RELU, "sweep", "left < width ? static_cast<int>(left) : width", "width"),
    # What a slot holds
    Mutation(RELU, "sweep", "vector && slot.full()", "vector", 0),
    Mutation(RELU, "sweep", "vector && slot.full()", "vector", 1),
    Mutation(RELU, "sweep", "vector && slot.full()", "slot.full()", 0),
    Mutation(RELU, "sweep", "vector && slot.full()", "slot.full()", 1),
    Mutation(
        RELU,
        "sweep",
        "slot.holds(e) ? map[slot.offset + e] : from_accumulate<T>(0)",
        "map[slot.offset + e]",
    ),
    Mutation(RELU, "sweep", "if (slot.holds(e)) map", "map"),
    Mutation(STATS, "statistics", "if (!slot.holds(e)) continue;", ""),
    Mutation(
        STATS,
        "statistics",
        "slots[i].holds(e) ? source.at(slots[i].offset + e) : A(0)",
        "source.at(slots[i].offset + e)",
    ),
    Mutation(
        REDUCE,
        "sweep",
        "slot.holds(e) ? map[slot.offset + e] : from_accumulate<T>(0)",
        "map[slot.offset + (slot.holds(e) ? e : slot.first)]",
    ),
    # Channels and chunks
    Mutation(
        APPLY,
        "channel_table",
        "if (const int t = threadIdx.x; t < size) {",
        "{ const int t = threadIdx.x;",
    ),
    Mutation(STATS, "two_sums", "if (t < walk.table_size()) {", "{"),
    Mutation(STATS, "two_sums", "stride > 0 ? chunks : 0", "chunks"),
    Mutation(STATS, "two_sums", "if (row < end) next", "next"),
    Mutation(STATS, "two_sums", "if (chunk + kJoinRows < end) next", "next"),
    Mutation(STATS, "statistics", "if (other.count == 0) return;", ""),
    Mutation(
        STATS, "statistics", "active && threadIdx.x < kJoinChannels", "threadIdx.x < kJoinChannels"
    ),
    Mutation(STATS, "statistics", "active && threadIdx.x < kJoinChannels", "active"),
    Mutation(
        REDUCE, REDUCE, "active && threadIdx.x < kJoinChannels", "threadIdx.x < kJoinChannels"
    ),
    Mutation(REDUCE, REDUCE, "active && threadIdx.x < kJoinChannels", "active"),
    Mutation(APPLY, APPLY, "if (grad_skip != nullptr) load_slot", "load_slot"),
]


def outcome(op: str, csrc: Path, folder: Path) -> str:
    """Empty where the program made of ``csrc`` passes, else how it fails."""
    program = compile_program(op, csrc, define=["HARNESS_FLOAT_ONLY"])
    cases = list(samples(op, torch.float32))
    folders = [prepare(folder / str(i), one.folder) for i, one in enumerate(cases)]
    result = run(program, folders)
    if csrc != CSRC:
        program.unlink()
    if result.returncode:
        return next(line for line in result.stderr.splitlines() if line.strip("= "))
    try:
        for place, one in zip(folders, cases, strict=True):
            one.check(results_of(place, one))
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("op", OPS)
def test_unchanged_sources_pass(op, tmp_path):
    assert outcome(op, CSRC, tmp_path) == ""


@pytest.fixture(scope="module")
def caught(request, tmp_path_factory):
    chosen = [i.callspec.params["mutation"] for i in request.session.items if is_ours(i)]
    folder = tmp_path_factory.mktemp("mutations")

    def one(number: int, mutation: Mutation) -> str:
        own = folder / str(number)
        return outcome(mutation.op, mutate(mutation, own / "csrc"), own / "cases")

    with outcomes(chosen, one) as results:
        yield results


def is_ours(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and "mutation" in getattr(item, "fixturenames", ())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation, caught):
    how = caught[mutation].result()
    assert how, "nothing noticed the change"
    print(f"\n{mutation.file}: {mutation.old!r} -> {mutation.new!r}\n  caught: {how}")


def test_every_barrier_is_tried():
    assert barriers(OPS) == barriers_removed(MUTATIONS)
