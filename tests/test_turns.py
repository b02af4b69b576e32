"""Chunks that threads share: each given once, and to whom it should be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import cuda_emulation

PROGRAM = Path(__file__).resolve().parent / "turns" / "turns.cpp"


@pytest.mark.skipif(cuda_emulation.why_not() != "", reason=cuda_emulation.why_not())
def test_chunk_queue(tmp_path: Path) -> None:
    compiler, csrc = cuda_emulation.compiler(), cuda_emulation.CSRC
    options = ["-std=c++20", "-O1", "-pthread", *cuda_emulation.SANITIZERS]
    sources = [str(PROGRAM), str(csrc / "cpu" / "turns.cpp")]
    program = str(tmp_path / "turns")
    command = [compiler, *options, *cuda_emulation.WARNINGS, f"-I{csrc}", *sources, "-o", program]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
