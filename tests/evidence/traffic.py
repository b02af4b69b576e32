"""Counts the bytes that kernels load and store, by address, in the interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder


@dataclass
class Access:
    """What one kernel did with one of its tensors."""

    size: int
    """Bytes of an element."""
    loaded: np.ndarray = field(repr=False)
    stored: np.ndarray = field(repr=False)
    """How often each element was."""
    owner: np.ndarray = field(repr=False)
    """The program that last stored it, or -1."""
    fetched: np.ndarray = field(repr=False)
    """Whether some load met what the launch had not stored itself."""

    @property
    def loads(self) -> int:
        """Distinct bytes loaded, whoever stored them: the letter."""
        return int(np.count_nonzero(self.loaded)) * self.size

    @property
    def returned(self) -> int:
        """Of these, those that only the program loads which stored them just before: they are in a
        cache still, unless it is smaller than what a program reads."""
        return int(np.count_nonzero((self.loaded > 0) & ~self.fetched)) * self.size

    @property
    def stores(self) -> int:
        return int(np.count_nonzero(self.stored)) * self.size

    @property
    def reread(self) -> float:
        """How often an element that is loaded is loaded, on average."""
        return float(self.loaded.sum()) * self.size / self.loads if self.loads else 0.0


@dataclass
class Traffic:
    """One launch: bytes by the names of the kernel's arguments."""

    kernel: str
    tensors: dict[str, Access]

    @property
    def loads(self) -> int:
        return sum(access.loads for access in self.tensors.values())

    @property
    def stores(self) -> int:
        return sum(access.stores for access in self.tensors.values())

    @property
    def bytes(self) -> int:
        return self.loads + self.stores


class _Counter:
    """The tensors of the launch under way, by address."""

    def __init__(self) -> None:
        self.finished: list[Traffic] = []
        self.ranges: list[tuple[int, int, Access]] = []
        self.program = 0

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.ranges.clear()
        tensors: dict[str, Access] = {}
        for name, value in arguments.items():
            value = getattr(value, "base", value)  # of a tensor descriptor
            if not isinstance(value, Tensor):
                continue
            start = value.data_ptr()
            # A tensor given twice, or a view of another: counted under its first name.
            if any(first <= start < last for first, last, _ in self.ranges):
                continue
            span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            size = value.element_size()
            loaded, stored = (np.zeros(span, dtype=np.int32) for _ in range(2))
            owner, fetched = np.full(span, -1, dtype=np.int64), np.zeros(span, dtype=bool)
            access = Access(size, loaded, stored, owner, fetched)
            tensors[name] = access
            self.ranges.append((start, start + span * size, access))
        self.finished.append(Traffic(kernel, tensors))

    def count(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.shape(pointers.data))[
            np.broadcast_to(mask.data, np.shape(pointers.data))
        ]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        for first, last, access in self.ranges:
            if first <= low < last:
                assert high < last, f"{kind} reaches beyond the tensor it begins in"
                offsets = (addresses - np.uint64(first)).astype(np.int64) // access.size
                if kind == "stored":
                    access.owner[offsets] = self.program
                else:
                    owner = access.owner[offsets]
                    others = (owner >= 0) & (owner != self.program)
                    assert not others.any(), "a program loads what another one stores"
                    access.fetched[offsets[owner < 0]] = True
                np.add.at(getattr(access, kind), offsets, 1)
                return
        raise AssertionError(f"{kind}: an address outside every tensor of the kernel")


def count(call: Callable[[], object]) -> list[Traffic]:
    """The traffic of each kernel that ``call`` launches, in order. Fails on a stray access."""
    counter = _Counter()
    execute = interpreter.GridExecutor.__call__
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    place = _Builder.set_grid_idx

    def executed(self: Any, *args: Any, **kwargs: Any) -> None:
        accepted = {k: v for k, v in kwargs.items() if k in self.arg_names}
        counter.begin(self.fn.__name__, inspect.getcallargs(self.fn, *args, **accepted))
        execute(self, *args, **kwargs)

    def placed(self: Any, x: int, y: int, z: int) -> None:
        place(self, x, y, z)
        across, down, _ = self.grid_dim
        counter.program = x + across * (y + down * z)

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.count("loaded", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.count("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", executed),
        mock.patch.multiple(
            _Builder, create_masked_load=loaded, create_masked_store=stored, set_grid_idx=placed
        ),
    ):
        call()
    return counter.finished
