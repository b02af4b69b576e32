"""Edits of a copy of the sources: a test must notice each of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import CSRC

BARRIER = "__syncthreads();"


class Mutation(NamedTuple):
    """``file`` is the stem of a ``.cuh``; the ``nth`` occurrence of ``old`` becomes ``new``."""

    op: str
    file: str
    old: str
    new: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.op}-{self.file}-{self.old}-{self.nth}"


def without_barrier(op: str, file: str, nth: int) -> Mutation:
    return Mutation(op, file, BARRIER, ";", nth)


def source(file: str) -> str:
    return (CSRC / "cuda" / f"{file}.cuh").read_text()


def place(mutation: Mutation) -> int:
    """Where in its file a mutation's text begins."""
    pieces = source(mutation.file).split(mutation.old)
    assert len(pieces) > mutation.nth + 1, f"{mutation.old!r} is not in {mutation.file}.cuh"
    return len(mutation.old.join(pieces[: mutation.nth + 1]))


def barriers() -> set[tuple[str, int]]:
    """Every ``__syncthreads`` of every kernel, by file and number."""
    files = sorted(path.stem for path in (CSRC / "cuda").glob("*.cuh"))
    return {(file, nth) for file in files for nth in range(source(file).count(BARRIER))}


def barriers_removed(mutations: Sequence[Mutation]) -> set[tuple[str, int]]:
    return {
        (m.file, source(m.file).count(BARRIER, 0, place(m)))
        for m in mutations
        if BARRIER in m.old and BARRIER not in m.new
    }


def mutate(mutation: Mutation, folder: Path) -> Path:
    """A copy of the sources with the one edit."""
    for part in ("cuda", "common"):
        shutil.copytree(CSRC / part, folder / part)
    text, at = source(mutation.file), place(mutation)
    path = folder / "cuda" / f"{mutation.file}.cuh"
    path.write_text(text[:at] + mutation.new + text[at + len(mutation.old) :])
    return folder


@contextmanager
def outcomes(
    mutations: Sequence[Mutation], outcome: Callable[[str, Path, Path], str], folder: Path
) -> Iterator[dict[Mutation, Future[str]]]:
    """``outcome(op, csrc, folder)`` of every mutation, worked out on all processors at once."""

    def one(number: int, mutation: Mutation) -> str:
        own = folder / str(number)
        return outcome(mutation.op, mutate(mutation, own / "csrc"), own / "cases")

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        yield {m: pool.submit(one, number, m) for number, m in enumerate(mutations)}
        pool.shutdown(cancel_futures=True)
