"""The kernels for other processors: the tests of the ops again, with the choice lowered, or with
tile registers emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preact.backends import available, cpu_capability

from . import cuda_emulation

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


TILE_REGISTERS = Path(__file__).parent / "tile_emulation" / "tile_registers.cpp"


def run(files: list[str], *options: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *options]
        + [str(Path(__file__).parent / file) for file in files],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert " passed" in result.stdout.splitlines()[-1], "nothing ran"


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
@pytest.mark.parametrize("capability", SETS[:-1])
def test_ops_pass_with(capability):
    if SETS.index(cpu_capability()) <= SETS.index(capability):
        pytest.skip(f"this processor runs {cpu_capability()} anyway")
    files = FILES if capability == "baseline" else FILES + WITH_VECTORS
    library = {"ONEDNN_MAX_CPU_ISA": LIBRARY[capability]} if capability in LIBRARY else {}
    run(files, PREACT_CPU_CAPABILITY=capability.lower(), **library)


@pytest.mark.skipif(available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}")
@pytest.mark.parametrize("caches", ["8192,65536", "262144,8388608"])
def test_convolutions_pass_with_caches(caches: str) -> None:
    """Smaller and larger blocks than this machine's."""
    run(["test_conv_ops.py", "test_direct_convolution.py"], PREACT_CPU_CACHES=caches)


@pytest.fixture
def tile_registers(tmp_path: Path) -> Path:
    """What emulates them, compiled to be preloaded."""
    reason = cuda_emulation.why_not()
    if cpu_capability() != "AVX512_BF16":
        # AMX runs the tests itself, lesser ones could not run what stands around its instructions.
        reason = f"tile registers are emulated on AVX512_BF16, not on {cpu_capability()}"
    if reason:
        pytest.skip(reason)
    library = tmp_path / "tile_registers.so"
    options = ["-std=c++17", "-O3", "-mfma", *cuda_emulation.WARNINGS, "-shared", "-fPIC"]
    command = [cuda_emulation.compiler(), *options, str(TILE_REGISTERS), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_ops_pass_with_emulated_tile_registers(tile_registers: Path) -> None:
    """The very instructions that a processor with AMX would run, done by what is preloaded."""
    preload = {"LD_PRELOAD": str(tile_registers)}
    found = subprocess.run(
        [sys.executable, "-c", "from preact.backends import cpu_capability as c; print(c())"],
        env=os.environ | preload,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "AMX"
    # Python's handler would take the signal that the emulation waits for.
    run(FILES + WITH_VECTORS, "-p", "no:faulthandler", **preload)
