"""Runs the kernels' PTX, instruction by instruction, on whole arrays of registers.

As much of PTX as ``preact.triton_kernels._packed`` writes, by the PTX ISA's definitions; anything
else is an error. A register is an array of bits, which each instruction reads by its own type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from preact import device as devices
from preact.triton_kernels import _packed

_Handle = interpreter.TensorHandle
_STATEMENT = re.compile(r"([\w.]+)\s+(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")


def _f32(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` rounded once, but for a tie that float64 hides."""
    wide = np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float32)


def _widen(bits: np.ndarray, half: str) -> np.ndarray:
    if half == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _narrow(values: np.ndarray, half: str) -> np.ndarray:
    kind = torch.bfloat16 if half == "bf16" else torch.float16
    rounded = torch.from_numpy(np.array(values, np.float32, ndmin=1)).to(kind)
    return rounded.view(torch.uint16).numpy().reshape(np.shape(values)).astype(np.uint64)


class Registers:
    """Those of one piece of assembly, by name; ``$0`` and so on are its operands."""

    def __init__(self, operands: dict[str, np.ndarray]) -> None:
        self.held = dict(operands)

    def read(self, name: str) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", name):
            return np.uint64(int(name, 0))  # type: ignore[return-value]
        return self.held[name]

    def run(self, code: str) -> None:
        for statement in code.strip().removeprefix("{").removesuffix("}").split(";"):
            if statement.strip():
                self.step(statement.strip())

    def step(self, statement: str) -> None:
        found = _STATEMENT.fullmatch(statement)
        assert found, statement
        name, rest = found.groups()
        # A declaration: ``.reg .b32 a, b``.
        if name == ".reg":
            return
        to, *sources = _OPERAND.findall(rest)
        self.write(to, name, [self.gather(name, source) for source in sources])

    def gather(self, name: str, source: str) -> np.ndarray:
        if not source.startswith("{"):
            return self.read(source)
        low, high = (self.read(part) for part in _OPERAND.findall(source.strip("{}")))
        width = int(name[-2:]) // 2
        return low | high << np.uint64(width)

    def write(self, to: str, name: str, values: Sequence[np.ndarray]) -> None:
        result = self.result(name, values)
        if not to.startswith("{"):
            self.held[to] = result
            return
        width = int(name[-2:]) // 2
        low, high = _OPERAND.findall(to.strip("{}"))
        self.held[low] = result & np.uint64((1 << width) - 1)
        self.held[high] = result >> np.uint64(width)

    def result(self, name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        first, *rest = values
        match name.split("."):
            case ["mov", "b32" | "b64"]:
                return first
            case ["shl", "b32"]:
                return first << rest[0] & np.uint64(0xFFFFFFFF)
            case ["and", "b32"]:
                return first & rest[0]
            case ["or", "b32"]:
                return first | rest[0]
            case ["sub", "f32"]:
                return _bits(_f32(first) - _f32(rest[0]))
            case ["sub", "f32", "bf16" | "f16" as half]:
                return _bits(_widen(first, half) - _f32(rest[0]))
            case ["fma", "rn", "f32"]:
                return _bits(_fused(_f32(first), _f32(rest[0]), _f32(rest[1])))
            case ["fma", "rn", "f32x2"]:
                low = _fused(*(_f32(v & np.uint64(0xFFFFFFFF)) for v in values))
                high = _fused(*(_f32(v >> np.uint64(32)) for v in values))
                return _bits(low) | _bits(high) << np.uint64(32)
            case ["cvt", "f32", "f16"]:
                return _bits(_widen(first, "f16"))
            case ["cvt", "rn", *relu, "bf16x2" | "f16x2" as pair, "f32"]:
                assert relu in ([], ["relu"]), name
                # The first source goes to the upper half; what is no number stays none.
                high, low = (_f32(v) for v in values)
                if relu:
                    high, low = (np.where(v <= 0, np.float32(0), v) for v in (high, low))
                half = pair.removesuffix("x2")
                return _narrow(low, half) | _narrow(high, half) << np.uint64(16)
        raise NotImplementedError(name)


def _registers(values: np.ndarray, scalar: Any, pack: int) -> list[np.ndarray]:
    """Those that a thread passes for ``pack`` neighbours of a flat array."""
    bits = values.view(f"u{values.dtype.itemsize}").astype(np.uint64).reshape(-1, pack)
    each = max(32 // scalar.primitive_bitwidth, 1)
    return [
        sum(bits[:, i + k] << np.uint64(k * (32 // each)) for k in range(each))
        for i in range(0, pack, each)
    ]


def _inline_asm(
    self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
) -> Any:
    (result,) = types
    shape = np.shape(values[0].data)
    inputs = [r for v in values for r in _registers(v.data, v.dtype.scalar, pack)]
    results = [c for c in constraints.split(",") if c.startswith("=")]
    assert (results, pack) == (["=r"], 2), "a word of two halves is all that the kernels return"
    assert constraints.count(",") == len(inputs), "an operand of another size"
    registers = Registers({f"${i + 1}": bits for i, bits in enumerate(inputs)})
    with np.errstate(all="ignore"):
        registers.run(asm)
    packed = registers.held["$0"].astype(np.uint32)
    data = packed.view(np.uint16).reshape(shape)
    kind = interpreter._get_np_dtype(result.scalar)
    return _Call(_Handle(data.view(kind), result.scalar))


class _Call:
    """What the builder returns of a call: its results by index."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, index: int) -> Any:
        return self.handle


@contextmanager
def executed(arch: int) -> Iterator[Counter[str]]:
    """Within the block launchers pass the code for ``sm_<arch>``, and the interpreter runs it.

    Yields how often each piece of code ran.
    """
    ran: Counter[str] = Counter()

    def run(self: Any, asm: str, *rest: Any) -> Any:
        ran[asm] += 1
        return _inline_asm(self, asm, *rest)

    compiled = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", run),
        mock.patch.object(_packed, "knobs", compiled),
        mock.patch.object(devices, "WRITTEN_DEFAULT", devices.Properties("none", arch, 132)),
    ):
        yield ran
