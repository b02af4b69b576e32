"""Compiles the ``.cuh`` kernels for the host and runs them on cases made here.

A case is a dict: tensors are handed to the kernel (None: absent), everything else is text. The
program of an op is ``<op>.cpp`` beside this file; ``harness.h`` says what it gets and gives back.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_emulation"
FAILURE = 70  # emulation::kFailure
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def why_not() -> str:
    """Empty where kernels can be emulated, else the reason why not."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the emulation has no fibres for {platform.system()} on {platform.machine()}"
    return "" if shutil.which(compiler()) else f"no C++ compiler found ({compiler()})"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def digest(command: Sequence[str], csrc: Path) -> str:
    """Of the command and of every file of ours that it reads, by name and content."""
    result = subprocess.run([*command, "-MM"], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"not compiled for the host:\n{result.stderr}")
    state = hashlib.sha256(" ".join(command).replace(str(csrc), "csrc").encode())
    for word in result.stdout.replace("\\\n", " ").split()[1:]:
        state.update(Path(word).read_bytes())
    return state.hexdigest()[:20]


def compile_program(
    op: str, csrc: Path = CSRC, sanitize: bool = True, define: Sequence[str] = ()
) -> Path:
    """The program of an op, compiled against ``csrc`` unless it was before.

    Of mutated sources warnings are not asked: what an edit leaves unused is no news.
    """
    flags = [*FLAGS, *(WARNINGS if csrc == CSRC else ["-w"]), *(SANITIZERS if sanitize else [])]
    flags += [f"-D{name}" for name in define]
    includes = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{csrc}"]
    command = [compiler(), *flags, *includes, str(HERE / f"{op}.cpp")]
    program = CACHE / f"{op}-{digest(command, csrc)}"
    if program.exists():
        return program
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{op} does not compile for the host:\n{result.stderr}")
    unfinished.replace(program)
    return program


def _write(tensor: Tensor, path: Path) -> None:
    """The bytes in memory order: an NHWC tensor must come as channels_last."""
    last = torch.channels_last
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=last)
    ):
        tensor = tensor.permute(0, 2, 3, 1)
    assert tensor.is_contiguous()
    path.write_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def read(path: Path, dtype: torch.dtype) -> Tensor:
    data = path.read_bytes()
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def prepare(folder: Path, case: Mapping[str, Any]) -> Path:
    """Write a case for a program."""
    folder.mkdir(parents=True)
    lines = []
    for name, value in case.items():
        if isinstance(value, Tensor):
            _write(value, folder / f"{name}.bin")
        elif value is not None:
            lines.append(f"{name} {value}")
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(
    program: Path, folders: Sequence[Path], mutation: int = -1
) -> subprocess.CompletedProcess[str]:
    """Run a program on prepared cases; a failure is in the return code and on stderr."""
    options = {
        "MUTATION": str(mutation),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(program), *map(str, folders)],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=1800,
    )
