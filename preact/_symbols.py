"""Symbolic values: what a traced forward computes with, and what it may not do meanwhile."""

from __future__ import annotations

import operator
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.proxy import Attribute, Proxy
from torch.overrides import TorchFunctionMode, resolve_name

from ._shadow import TracingError

Kind = Any
"""What a plan knows about one argument: Tensor, list, tuple, or ``(type, value)`` of a constant."""


class Signature(NamedTuple):
    """The kinds of a call's arguments: one plan serves the calls of one signature."""

    args: tuple[Kind, ...]
    kwargs: tuple[tuple[str, Kind], ...]


def kind_of(value: Any) -> Kind:
    """Kind of an argument, None where no plan can be made for it."""
    if isinstance(value, Tensor):
        return Tensor
    if type(value) is list or type(value) is tuple:
        return type(value)
    if value is None or type(value) in (bool, int, float, str):
        return (type(value), value)
    return None


def _claimed_class(value: Proxy, frame: types.FrameType) -> type:
    tracer: Any = value.tracer
    claimed: type = tracer.claimed_class(value, frame)
    return claimed


class Value(Proxy):
    """A symbolic value that answers the forward's ``isinstance`` questions truthfully."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _claimed_class(self, sys._getframe(1))

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):  # asked by isinstance(x, nn.Parameter)
            return False
        return ValueAttribute(self, name)


class ValueAttribute(Attribute):
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _claimed_class(self, sys._getframe(1))

    def __getattr__(self, name: str) -> Attribute:
        return ValueAttribute(self, name)


def _inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# Without these Python falls back to the plain operator, and `x += y` would no longer change x.
for _name in ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "iand", "ior"):
    setattr(Value, f"__{_name}__", _inplace(getattr(operator, _name)))


def modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def has_value(arg: Any) -> bool:
    if type(arg) in (Value, ValueAttribute):
        return True
    return isinstance(arg, (list, tuple)) and any(map(has_value, arg))


class NoConstants(TorchFunctionMode):
    """Refuses tensor work on anything but symbolic values: a trace would freeze its result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(func) or str(func)
        if func is torch.tensor or func is torch.as_tensor:
            raise TracingError(f"it calls {name}")
        # Switching gradients is harmless as long as nothing is computed before they are back.
        if func is not torch._C._set_grad_enabled and not has_value([*args, *kwargs.values()]):
            raise TracingError(f"it calls {name} on something other than its input")
        return func(*args, **kwargs)


@contextmanager
def no_random_numbers() -> Iterator[None]:
    """Takes back numbers drawn from Python's or NumPy's global generators, and refuses them."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state: Any = numpy.random.get_state() if numpy else None
    drawn = False
    try:
        yield
    finally:
        if random.getstate() != python_state:
            random.setstate(python_state)
            drawn = True
        if numpy and repr(numpy.random.get_state()[2:]) != repr(numpy_state[2:]):  # its position
            numpy.random.set_state(numpy_state)
            drawn = True
    if drawn:
        raise TracingError("it draws random numbers in Python")
