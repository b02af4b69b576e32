"""Stand-ins for modules while a forward is traced.

Tracing runs the user's own ``forward`` on symbolic values, and never touches the model: every
module is represented by a *shadow*, an object of a subclass of its class with a copy of its
``__dict__``, whose call is recorded instead of executed. Nothing global is patched, so another
thread may run the model meanwhile, and whatever the forward writes lands on the shadow, where it is
noticed.

A shadow also notes every plain attribute that the forward reads. These reads are what the traced
code depends on, and become the guards under which it may be used.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

KEY = "_preact_block"
"""Name under which a fused block keeps its state in its ``__dict__``."""

MISSING: Any = object()
"""Expected value of an attribute that must not be there."""

_RECORD = "_preact_record"
_CHILDREN = frozenset({"_modules"})
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_SCALARS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_CONSTANTS = (torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_CODE = (*_FUNCTIONS, property, classmethod, staticmethod)


class TracingError(Exception):
    """The forward cannot be turned into a graph that is certain to stay right.

    ``guards`` are what the forward had depended on until then.
    """

    def __init__(self, reason: str, guards: Any = ((), (), ())) -> None:
        super().__init__(reason)
        self.guards = guards


def original_class(module: nn.Module) -> type[nn.Module]:
    """Class of ``module`` before fuse_ gave it a subclass of its own."""
    cls: type[nn.Module] = vars(type(module)).get("_preact_original", type(module))
    return cls


def freeze(value: Any) -> Any:
    """A copy of ``value`` that does not change when the caller's does.

    Raises:
        TracingError: for an object whose contents could change unnoticed.
    """
    if isinstance(value, (*_SCALARS, *_CONSTANTS, *_FUNCTIONS)):
        return value
    if isinstance(value, functools.partial):
        freeze((value.func, value.args, value.keywords))
        return value
    if type(value) in (tuple, torch.Size):
        frozen = tuple(freeze(v) for v in value)
        # The caller's own tuple, where nothing in it can change: `same` knows it at a glance.
        unchanged = type(value) is tuple and all(map(operator.is_, frozen, value))
        return value if unchanged else frozen
    if type(value) is list:
        return [freeze(v) for v in value]
    if type(value) in (set, frozenset):
        return type(value)(freeze(v) for v in value)
    if type(value) is dict:
        return {freeze(k): freeze(v) for k, v in value.items()}
    raise TracingError(f"it reads a {type(value).__name__}, whose contents cannot be watched")


def same(value: Any, expected: Any) -> bool:
    """Whether an attribute still holds what a trace saw, with True and 1 told apart."""
    if value is expected:
        return True
    kind = type(expected)
    if type(value) is not kind:
        return kind is tuple and isinstance(value, torch.Size) and tuple(value) == expected
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            same(value[k], v) for k, v in expected.items()
        )
    if isinstance(expected, (*_SCALARS, set, frozenset, torch.device)):
        return bool(value == expected)
    return False


class Record:
    """What the tracer knows about one module: where it is, and what was read from it."""

    __slots__ = (
        "before",
        "children_read",
        "class_reads",
        "leaf",
        "module",
        "path",
        "reads",
        "tracer",
    )

    def __init__(self, tracer: Any, module: nn.Module, path: str, leaf: bool) -> None:
        self.tracer = tracer
        self.module = module
        self.path = path
        self.leaf = leaf
        self.reads: dict[tuple[str, str], Any] = {}
        self.class_reads: dict[tuple[type, str], Any] = {}
        self.children_read = False
        self.before: dict[str, Any] = {}

    def read(self, name: str, value: Any) -> None:
        if name in _CHILDREN:
            self.children_read = True
        elif name not in _INTERNAL and name != _RECORD:
            if _differs(value, self.before.get(name, MISSING)):
                raise TracingError(f"it writes {name!r} on the module")
            if isinstance(value, torch.Tensor):
                raise TracingError(f"it reads the tensor {name!r}, which is no parameter or buffer")
            self.reads["", name] = freeze(value)

    def read_class(self, name: str) -> None:
        """An attribute of the class: neither it nor the object may get another one."""
        found = class_attribute(original_class(self.module), name)
        if found is None or found[-1][0].__module__.startswith("torch."):
            return
        for cls, value in found:
            self.class_reads[cls, name] = (
                value if isinstance(value, _CODE) or value is MISSING else freeze(value)
            )
        self.reads["", name] = MISSING


def class_attribute(cls: type, name: str) -> list[tuple[type, Any]] | None:
    """Where a class finds an attribute: the classes looked at in vain, and the one that has it."""
    passed: list[tuple[type, Any]] = []
    for base in cls.__mro__:
        if name in vars(base):
            return [*passed, (base, vars(base)[name])]
        passed.append((base, MISSING))
    return None


class _Shadow:
    """Mixin that comes before the module's own class in a shadow's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = object.__getattribute__(self, "__dict__").get(_RECORD)
        if record is None:  # built by the forward itself, for example by slicing a Sequential
            return self.forward(*args, **kwargs)
        return record.tracer.call(self, record, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("__"):
            members = object.__getattribute__(self, "__dict__")
            if _RECORD in members:
                if name in members:
                    members[_RECORD].read(name, value)
                else:
                    members[_RECORD].read_class(name)
        return value

    def __getattr__(self, name: str) -> Any:
        members = object.__getattribute__(self, "__dict__")
        record = members.get(_RECORD)
        if record is None or name.startswith("__"):
            return super().__getattr__(name)  # type: ignore[misc]
        for store in ("_parameters", "_buffers"):
            if name in members[store]:
                if members[store][name] is None:
                    record.reads[store, name] = None
                    return None
                return record.tracer.attribute(record, name)
        record.children_read = True
        if name not in members["_modules"]:
            record.reads["", name] = MISSING
        return super().__getattr__(name)  # type: ignore[misc]


_shadow_classes: dict[type, type] = {}


def _shadow_class(cls: type) -> type:
    if cls not in _shadow_classes:

        def body(namespace: dict[str, Any]) -> None:
            namespace["__module__"] = cls.__module__
            namespace["__qualname__"] = cls.__qualname__

        _shadow_classes[cls] = types.new_class(cls.__name__, (_Shadow, cls), {}, body)
    return _shadow_classes[cls]


def make_shadow(
    tracer: Any,
    module: nn.Module,
    path: str,
    is_leaf: Callable[[nn.Module, str], bool],
    training: bool | None,
    records: dict[int, tuple[Any, Record]],
) -> Any:
    """The shadow of ``module`` and of everything below it.

    Args:
        is_leaf: tells, for a module and its path, whether its call is recorded as one step.
        training: stands in for every module's ``training`` flag, unless None.
        records: filled with shadow and record for the ``id`` of each module.
    """
    if id(module) in records:
        return records[id(module)][0]
    record = Record(tracer, module, path, is_leaf(module, path))
    # ScriptModule and GraphModule keep their code elsewhere; only their call is of interest.
    special = isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))
    members = dict(nn.Module().__dict__) if special else dict(module.__dict__)
    shadow: Any = object.__new__(_shadow_class(nn.Module if special else original_class(module)))
    records[id(module)] = (shadow, record)
    members.pop(KEY, None)
    for name, value in members.items():
        if type(value) in (list, dict, set):
            members[name] = value.copy()
    if training is not None:
        members["training"] = training
    prefix = f"{path}." if path else ""
    children = {} if special else module._modules
    members["_modules"] = {
        name: child
        if child is None
        else make_shadow(tracer, child, prefix + name, is_leaf, training, records)
        for name, child in children.items()
    }
    record.before = {k: v.copy() if type(v) in (list, dict, set) else v for k, v in members.items()}
    members[_RECORD] = record
    object.__getattribute__(shadow, "__dict__").update(members)
    return shadow


def _differs(new: Any, old: Any) -> bool:
    if new is old:
        return False
    if type(new) is not type(old) or type(new) not in (list, dict, set) or len(new) != len(old):
        return True
    if type(new) is dict:
        pairs = zip(new.items(), old.items(), strict=True)
        return any(a[0] is not b[0] or a[1] is not b[1] for a, b in pairs)
    if type(new) is set:
        return bool(new != old)
    return any(a is not b for a, b in zip(new, old, strict=True))


def check_unchanged(shadows: Iterable[tuple[Any, Record]]) -> None:
    """Raise TracingError if a forward wrote to one of the modules."""
    for shadow, record in shadows:
        members = object.__getattribute__(shadow, "__dict__")
        for name in members.keys() | record.before.keys():
            old = record.before.get(name, MISSING)
            if name != _RECORD and _differs(members.get(name, MISSING), old):
                raise TracingError(f"it writes {name!r} on the module")
