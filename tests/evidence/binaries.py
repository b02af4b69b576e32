"""Compiles recorded launches ahead of time and reads what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton
from torch.torch_version import TorchVersion
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launches import Launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
COUNTED = TorchVersion(triton.__version__) >= "3.8"
"""Whether this is the compiler, or a later one, by whose code the tiles were chosen."""
MOST_STACK = 0 if COUNTED else 80
"""Bytes that a thread may keep in local memory: older compilers spill some in a few tiles."""
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have, from NVIDIA's table of compute capabilities."""
GRID_LIMIT = (2**31 - 1, 65535, 65535)
TENSOR_CORE = re.compile(r"U?[HQ]G?MMA|U?TC\w*MMA|OMMA")
"""Warp (HMMA), warp-group (HGMMA) and Blackwell's (UTCHMMA) matrix instructions."""

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_GLOBAL = re.compile(r"^(LDGSTS|LDG|STG)\b")


class Instruction(NamedTuple):
    address: int
    name: str
    """With its modifiers: ``LDG.E.128``."""
    operands: str


@dataclass(frozen=True)
class Loop:
    """Instructions between a backward branch and its target, that of inner loops included."""

    instructions: tuple[Instruction, ...]

    @property
    def tensor_core(self) -> int:
        return sum(bool(TENSOR_CORE.match(i.name)) for i in self.instructions)

    @property
    def tensor_core_names(self) -> set[str]:
        return {i.name for i in self.instructions if TENSOR_CORE.match(i.name)}

    def shared_bytes(self, warps: int) -> int:
        """What ``warps`` move to and from shared memory, but for what a product reads itself.

        A load counts one access of 128 bytes, the least: its lanes may ask for the same words.
        """
        stored = sum(
            32 * _width(i.name) for i in self.instructions if re.match(r"(STS|LDGSTS)\b", i.name)
        )
        loads = sum(
            i.name.startswith("LDS") and "[RZ]" not in i.operands for i in self.instructions
        )
        return warps * (stored + 128 * loads)

    @property
    def per_tensor_core(self) -> float:
        """Instructions issued for each matrix instruction, that one included."""
        return len(self.instructions) / self.tensor_core if self.tensor_core else float("inf")


@dataclass(frozen=True)
class Binary:
    """One kernel's machine code for one architecture."""

    name: str
    arch: int
    shared: int
    """Bytes of shared memory of one block."""
    num_warps: int
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    @cached_property
    def _usage(self) -> str:
        return _cuobjdump(self.cubin, "--dump-resource-usage")

    def _resource(self, name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", self._usage)
        assert found, f"cuobjdump tells no {name}: {self._usage}"
        return int(found.group(1))

    @property
    def registers(self) -> int:
        return self._resource("REG")

    @property
    def stack(self) -> int:
        """Bytes a thread keeps in local memory; anything above 0 is a spill.

        LLVM leaves a byte or two of it declared where nothing is kept there: with no instruction
        that touches memory of a thread's own, directly or by a generic address, they are none.
        """
        declared = self._resource("STACK") + self._resource("LOCAL")
        return declared if self.spills else 0

    @cached_property
    def sass(self) -> str:
        return _cuobjdump(self.cubin, "--dump-sass")

    @cached_property
    def instructions(self) -> list[Instruction]:
        found = [Instruction(int(a, 16), n, o) for a, n, o in _INSTRUCTION.findall(self.sass)]
        assert found, "no instruction was recognised in cuobjdump's listing"
        return found

    def count(self, pattern: str) -> int:
        """Instructions whose name, with modifiers, matches from its beginning."""
        return sum(bool(re.match(pattern, i.name)) for i in self.instructions)

    @property
    def spills(self) -> int:
        """Instructions that touch local memory, or memory that may be local."""
        return self.count(r"(LDL|STL|LD|ST)\b")

    @property
    def tensor_core(self) -> int:
        return sum(bool(TENSOR_CORE.match(i.name)) for i in self.instructions)

    @cached_property
    def global_accesses(self) -> Counter[tuple[str, int]]:
        """How many global loads (LDG, LDGSTS) and stores (STG) there are of each width in bytes."""
        return Counter(
            (found.group(1), _width(i.name))
            for i in self.instructions
            if (found := _GLOBAL.match(i.name))
        )

    @cached_property
    def loops(self) -> list[Loop]:
        """Every loop, the innermost ones first."""
        found = []
        for index, instruction in enumerate(self.instructions):
            target = _TARGET.search(instruction.operands)
            if not re.match(r"BRA\b", instruction.name) or target is None:
                continue
            start = int(target.group(1), 16)
            if start < instruction.address:  # the endless branch behind the last EXIT is no loop
                body = self.instructions[: index + 1]
                found.append(Loop(tuple(i for i in body if i.address >= start)))
        return sorted(found, key=lambda loop: len(loop.instructions))

    @property
    def main_loop(self) -> Loop:
        """The innermost loop with the most matrix instructions for each of its own."""
        loops = [loop for loop in self.loops if loop.tensor_core]
        assert loops, f"{self.name} for sm_{self.arch} has no loop with tensor-core instructions"
        return min(loops, key=lambda loop: loop.per_tensor_core)


def _width(name: str) -> int:
    """Bytes a thread moves: 4 unless the modifiers say otherwise."""
    bits = re.search(r"\.(?:[SU](8|16)|(64|128|256))\b", name)
    return int(bits.group(1) or bits.group(2)) // 8 if bits else 4


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True, timeout=300
        )
    return done.stdout


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Compile for ``sm_<arch>`` exactly what the launcher asked for."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {**launch.kwargs, "debug": False}
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return Binary(
        launch.name, arch, compiled.metadata.shared, compiled.metadata.num_warps,
        compiled.asm["cubin"], compiled.asm["ptx"],
    )  # fmt: skip


def assert_sound(binary: Binary, launch: Launch) -> None:
    """What holds for every kernel: no spill or atomic, shared memory and grid within the limits."""
    where = f"{binary.name} for sm_{binary.arch}: {launch.bound()} {launch.options()}"
    if COUNTED:
        assert binary.spills == 0, where
    assert binary.stack <= MOST_STACK, f"{binary.stack} bytes of local memory in {where}"
    assert not binary.count(r"(REDG?|ATOMG?)\b"), f"an atomic operation in {where}"
    assert binary.shared <= SHARED_LIMIT[binary.arch] * 1024, f"{binary.shared} bytes in {where}"
    assert all(0 < n <= m for n, m in zip(launch.grid, GRID_LIMIT, strict=False)), launch.grid


MAPS = {
    "input_ptr",
    "other_ptr",
    "output_ptr",
    "grad_output_ptr",
    "grad_skip_ptr",
    "grad_input_ptr",
}


def assert_widest(binary: Binary, launch: Launch, width: int) -> None:
    """Maps move in accesses of ``width`` bytes; narrower ones are of per-channel vectors."""
    values = launch.bound()
    maps = [name for name in MAPS if values.get(name) is not None]
    stored = [name for name in maps if name in ("output_ptr", "grad_input_ptr")]
    threads = 32 * binary.num_warps
    # A tile of one map takes this many accesses of a thread.
    tile = values["BLOCK_R"] * values["BLOCK_C"] * values["input_ptr"].element_size()
    once = -(-tile // (threads * width))
    accesses = binary.global_accesses
    found = f"{binary.name} for sm_{binary.arch}: {dict(accesses)}, {once} a tile and map"
    assert accesses["LDG", width] >= once * (len(maps) - len(stored)), found
    narrow = {(kind, size): n for (kind, size), n in accesses.items() if size < width}
    if stored:
        assert accesses["STG", width] >= once, found
    vectors = 2 * values["BLOCK_R"] if not values["CHANNELS_LAST"] else 8
    assert sum(n for (kind, _), n in narrow.items() if kind == "STG") <= 2, found
    assert sum(n for (kind, _), n in narrow.items() if kind == "LDG") <= 6 * vectors, found
    # The first value of a map, which its statistics are relative to, is read alone.
    assert sum(n for (_, size), n in narrow.items() if size < 4) <= 2, found
