"""Every file of ``tests/triton_kernels`` in Triton's interpreter, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from torch.torch_version import TorchVersion

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4",
    reason="the interpreter of Triton 3.6 needs a NumPy before 2.4",
)

FOLDER = Path(__file__).parent / "triton_kernels"
FILES = sorted(path.name for path in FOLDER.glob("*_*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "PREACT_BACKEND": "auto"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr]
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert "skipped" not in summary[0], f"something was left out: {summary[0]}"
