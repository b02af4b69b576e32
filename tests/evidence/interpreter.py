"""Triton's interpreter with bfloat16 as on a GPU, and quick enough for whole networks' shapes.

As it comes, the interpreter cuts float32 to bfloat16 instead of rounding, multiplies the bit
patterns of bfloat16 in ``tl.dot``, adds up a column one value after the other, and patches
``triton.language`` anew at every call of a device function. Nothing here knows our kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

ACTIVE = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in the interpreter (TRITON_INTERPRET=1 at its start)."""

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, by PyTorch."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32, ndmin=1)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy().reshape(np.shape(values))


def _cast(original: Any) -> Any:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == tl.bfloat16 and new.is_floating():
            wide = _widen(np.asarray(source.data))
            return _Handle(wide.astype(interpreter._get_np_dtype(new)), new)
        if new == tl.bfloat16 and old.is_floating():
            return _Handle(_narrow(np.asarray(source.data)), new)
        return original(self, source, target, *rounding)

    return cast


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    left, right = (
        _widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(d.data.dtype)
        for x in (a, b)
    )
    return _Handle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _sum(self: Any, input: Any) -> Any:
    """As a tree, the way threads and warps add."""
    data = input.handle.data
    axis = self.axis
    if axis is None:
        data, axis = data.reshape(-1), 0
    data = np.moveaxis(data, axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        data = data[:half] + data[half:]
    result = data[0]
    if self.keep_dims:
        result = np.expand_dims(result, axis) if self.axis is not None else result.reshape(
            [1] * input.handle.data.ndim
        )  # fmt: skip
    return self.to_tensor(result, input.dtype)


class _Patches:
    """The modules of device functions that this launch has patched ``triton.language`` for."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.execute = interpreter.GridExecutor.__call__

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        self.done.clear()
        self.execute(executor, *args, **kwargs)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(function.fn.__globals__)
        if module not in self.done:
            self.done.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)


@contextmanager
def repaired() -> Iterator[None]:
    """Within the block the interpreter's arithmetic is a GPU's."""
    casts = ("create_si_to_fp", "create_fp_ext", "create_fp_trunc", "create_fp_to_fp")
    changes = {name: _cast(getattr(_Builder, name)) for name in casts} | {"create_dot": _dot}
    patches = _Patches()
    with (
        mock.patch.multiple(_Builder, **changes),
        mock.patch.object(interpreter.ReduceOps, "sum", _sum),
        mock.patch.object(
            interpreter.GridExecutor, "__call__", lambda *a, **k: patches.launch(*a, **k)
        ),
        mock.patch.object(
            interpreter.InterpretedFunction, "__call__", lambda *a, **k: patches.call(*a, **k)
        ),
    ):
        yield
