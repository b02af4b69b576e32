"""Edits of a copy of the sources: a test must notice each of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def without(op: str, file: str, statement: str, nth: int = 0) -> Mutation:
    return Mutation(op, file, statement, ";", nth)


def without_barrier(op: str, file: str, nth: int) -> Mutation:
    return without(op, file, BARRIER, nth)


def source(file: str) -> str:
    return (CSRC / "cuda" / f"{file}.cuh").read_text()


def place(mutation: Mutation) -> int:
    """Where in its file a mutation's text begins."""
    pieces = source(mutation.file).split(mutation.old)
    assert len(pieces) > mutation.nth + 1, f"{mutation.old!r} is not in {mutation.file}.cuh"
    return len(mutation.old.join(pieces[: mutation.nth + 1]))


def included(files: Iterable[str]) -> set[str]:
    """The kernels' files that ``files`` consist of, themselves among them."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += re.findall(r'#include "cuda/(\w+)\.cuh"', source(file))
    return found


def barriers(files: Iterable[str]) -> set[tuple[str, int]]:
    """Every ``__syncthreads`` in ``files`` and what they include, by file and number."""
    return {(f, nth) for f in included(files) for nth in range(source(f).count(BARRIER))}


def barriers_removed(mutations: Sequence[Mutation]) -> set[tuple[str, int]]:
    return {
        (m.file, source(m.file).count(BARRIER, 0, place(m)))
        for m in mutations
        if BARRIER in m.old and BARRIER not in m.new
    }


def copy_sources(folder: Path) -> Path:
    for part in ("cuda", "common"):
        shutil.copytree(CSRC / part, folder / part)
    return folder


def mutate(mutation: Mutation, folder: Path) -> Path:
    """A copy of the sources with the one edit."""
    copy_sources(folder)
    text, at = source(mutation.file), place(mutation)
    path = folder / "cuda" / f"{mutation.file}.cuh"
    path.write_text(text[:at] + mutation.new + text[at + len(mutation.old) :])
    return folder


def switched(mutations: Sequence[Mutation], folder: Path) -> Path:
    """A copy of the sources with every edit behind a switch, numbered as in ``mutations``.

    What an edit replaces must be an expression or, for one that leaves nothing, a statement. Edits
    of the same text at the same place are alternatives.
    """
    copy_sources(folder)
    edits: dict[tuple[str, int], list[int]] = {}
    for number, mutation in enumerate(mutations):
        edits.setdefault((mutation.file, place(mutation)), []).append(number)
    texts: dict[str, str] = {}
    for (file, at), numbers in sorted(edits.items(), reverse=True):  # the last of a file first
        text, old = texts.get(file, source(file)), mutations[numbers[0]].old
        assert all(mutations[n].old == old for n in numbers), f"edits of {old!r} overlap"
        new = old if old.endswith(";") else f"({old})"
        for n in numbers:
            if old.endswith(";"):
                new = f"if (::emulation::mutation != {n}) {{ {new} }}"
            else:
                new = f"(::emulation::mutation == {n} ? ({mutations[n].new}) : {new})"
        texts[file] = text[:at] + new + text[at + len(old) :]
    for file, text in texts.items():
        (folder / "cuda" / f"{file}.cuh").write_text(text)
    return folder


@contextmanager
def outcomes(
    mutations: Sequence[Mutation], outcome: Callable[[int, Mutation], str]
) -> Iterator[dict[Mutation, Future[str]]]:
    """``outcome`` of every mutation and its number, worked out on all processors at once."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        yield {m: pool.submit(outcome, number, m) for number, m in enumerate(mutations)}
        pool.shutdown(cancel_futures=True)
