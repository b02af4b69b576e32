"""The kernels for lesser processors: the tests of the ops again, with the choice lowered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preact.backends import available, cpu_capability

SETS = ["baseline", "AVX2", "AVX512", "AVX512_BF16", "AMX"]
FILES = [
    "test_ops.py",
    "test_bfloat16_rounding.py",
    "test_conv_ops.py",
    "test_direct_convolution.py",
    "test_pooled.py",
]
# The library lowered as well: against one that multiplies bfloat16 ours does not try without.
LIBRARY = {"AVX2": "AVX2", "AVX512": "AVX512_CORE"}
# Units and blocks are one op where convolutions of ours run, which AVX2 makes worth while.
WITH_VECTORS = ["test_dense_block_ops.py", "test_dense_block.py", "test_identity_units.py"]


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
@pytest.mark.parametrize("capability", SETS[:-1])
def test_ops_pass_with(capability):
    if SETS.index(cpu_capability()) <= SETS.index(capability):
        pytest.skip(f"this processor runs {cpu_capability()} anyway")
    files = FILES if capability == "baseline" else FILES + WITH_VECTORS
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *(Path(__file__).parent / f for f in files)],
        env=os.environ
        | {"PREACT_CPU_CAPABILITY": capability.lower()}
        | ({"ONEDNN_MAX_CPU_ISA": LIBRARY[capability]} if capability in LIBRARY else {}),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]
