"""Chunks that threads share: each given once, without a race, and to whom it should be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import cuda_emulation

PROGRAM = Path(__file__).resolve().parent / "turns" / "turns.cpp"
SANITIZERS = {"races": "thread", "memory": "address,undefined"}


@pytest.mark.skipif(cuda_emulation.why_not() != "", reason=cuda_emulation.why_not())
@pytest.mark.parametrize("found", SANITIZERS)
def test_chunk_queue(found: str, tmp_path: Path) -> None:
    compiler, csrc = cuda_emulation.compiler(), cuda_emulation.CSRC
    options = ["-std=c++20", "-O1", "-pthread", f"-fsanitize={SANITIZERS[found]}"]
    options += ["-fno-sanitize-recover=all", *cuda_emulation.WARNINGS, f"-I{csrc}"]
    program = tmp_path / "turns"
    command = [compiler, *options, str(PROGRAM), str(csrc / "cpu" / "turns.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this kernel places memory where the compiler's thread sanitizer cannot be")
    assert result.returncode == 0, result.stderr
