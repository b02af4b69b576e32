"""Chunks that threads share: each given once, without a race, and to whom it should be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import cuda_emulation

PROGRAM = Path(__file__).resolve().parent / "turns" / "turns.cpp"
SANITIZERS = {"races": "-fsanitize=thread", "memory": "-fsanitize=address,undefined"}


@pytest.mark.skipif(cuda_emulation.why_not() != "", reason=cuda_emulation.why_not())
@pytest.mark.parametrize("found", SANITIZERS)
def test_chunk_queue(found: str, tmp_path: Path) -> None:
    sources = [str(PROGRAM), str(cuda_emulation.CSRC / "cpu" / "turns.cpp")]
    options = ["-std=c++20", "-O1", "-pthread", SANITIZERS[found], "-fno-sanitize-recover=all"]
    flags = [*options, *cuda_emulation.WARNINGS, f"-I{cuda_emulation.CSRC}"]
    program = tmp_path / "turns"
    command = [cuda_emulation.compiler(), *flags, *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        # The thread sanitizer of GCC 12 has no room for a layout as random as some kernels make it.
        fixed = ["setarch", "--addr-no-randomize", str(program)]
        result = subprocess.run(fixed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
