"""The graph of one block: its forward, run on symbolic values over shadows of its modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, Scope, TracerBase
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ._shadow import (
    MISSING,
    Record,
    TracingError,
    check_unchanged,
    class_attribute,
    freeze,
    make_shadow,
    original_class,
)
from ._symbols import (
    Kind,
    NoConstants,
    Signature,
    Value,
    ValueAttribute,
    modes,
    no_random_numbers,
)
from .hooks import HOOKS

# A graph holds the operations alone, so what runs inside these would lose its meaning.
_WRAPPERS = {
    "torch.utils.checkpoint": "it checkpoints part of its forward",
    "torch._dynamo.eval_frame": "it calls a torch.compile'd function",
}
_TENSOR_MODULES = (
    nn.modules.conv._ConvNd,
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    nn.ReLU,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_TENSOR_FUNCTIONS = {
    torch.cat, torch.add, torch.relu, torch.flatten, torch.mul, F.relu, F.dropout, F.conv2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad, F.batch_norm,
}  # fmt: skip


class Tracer(TracerBase):
    """Runs one forward and collects its graph; one object per trace."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack: Any = {}
        self.node_name_to_scope: dict[str, Any] = {}
        self.records: dict[int, tuple[Any, Record]] = {}
        self.by_path: dict[str, Record] = {}
        self.entered: set[str] = set()
        self.stack: tuple[tuple[str, int], ...] = ()
        self.stacks: dict[fx.Node, tuple[tuple[str, int], ...]] = {}
        self.kinds: dict[fx.Node, type] = {}
        self.asked_type = False
        self.modes = modes()

    def proxy(self, node: fx.Node) -> Proxy:
        return Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _RUN_CODE:
            reason = _WRAPPERS.get(frame.f_globals.get("__name__", ""))
            if reason is not None:
                raise TracingError(reason)
            frame = frame.f_back
        if modes() != self.modes:
            raise TracingError("it switches gradients or autocast (as autograd Functions do)")
        node = super().create_node(*args, **kwargs)
        self.stacks[node] = self.stack
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (Tensor, nn.Module)) and not isinstance(a, Proxy):
            raise TracingError("it passes on a tensor or module of its own")
        if isinstance(a, types.FunctionType):
            raise TracingError("it passes on a function")
        return super().create_arg(a)

    def attribute(self, record: Record, name: str) -> Proxy:
        path = f"{record.path}.{name}" if record.path else name
        return self.create_proxy("get_attr", path, (), {})

    def call(self, shadow: Any, record: Record, args: Any, kwargs: Any) -> Any:
        """A call of a module below the root: one step, or its own steps where it is opened."""
        if record.leaf:
            return self.create_proxy("call_module", record.path, args, kwargs)
        outer, count = self.stack, len(self.graph.nodes)
        self.entered.add(record.path)
        self.stack = (*outer, (record.path, count))
        try:
            return shadow.forward(*args, **kwargs)
        except Exception:  # whatever cannot be traced remains one step
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - count]:
                del self.stacks[node]
                self.graph.erase_node(node)
            record.leaf = True
            self.entered.discard(record.path)
        finally:
            self.stack = outer
        return self.create_proxy("call_module", record.path, args, kwargs)

    def claimed_class(self, value: Proxy, frame: types.FrameType) -> type:
        """Answer to ``isinstance``: the type this value will have, refused where unknown."""
        caller = frame.f_globals.get("__name__", "")
        names = frame.f_code.co_names
        if caller.startswith(("torch.fx", __package__ + "._")):
            return type(value)
        # C code asks as well, to find real tensors; only Python's own question gets the answer.
        if "isinstance" not in names and "is_tensor" not in names:
            return type(value)
        kind = None if type(value) is ValueAttribute else self._kind(value.node)
        if kind is None:
            if caller.startswith("torch."):
                return type(value)
            raise TracingError("it branches on the type of an intermediate result")
        self.asked_type = self.asked_type or value.node.op == "placeholder"
        return kind

    def _kind(self, node: fx.Node) -> type | None:
        if node.op == "placeholder":
            return self.kinds[node]
        if node.op == "get_attr":
            return Tensor
        if node.op == "call_module":
            known = isinstance(self.by_path[str(node.target)].module, _TENSOR_MODULES)
            return Tensor if known else None
        return Tensor if node.target in _TENSOR_FUNCTIONS else None


class Trace:
    """The graph of one block's forward, and what it depends on."""

    def __init__(self, tracer: Tracer, root: nn.Module, signature: Signature) -> None:
        self.graph = tracer.graph
        self.root = root
        self.signature = signature
        self.asked_type = tracer.asked_type
        self._tracer = tracer
        self._checks: dict[tuple[Any, str], tuple[Any, Any, Any]] = {}
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._hooks: dict[int, Any] = {}
        for record in tracer.by_path.values():
            for (store, name), value in record.reads.items():
                owner = record.module.__dict__
                self._check(owner[store] if store else owner, name, value)
            for (cls, name), value in record.class_reads.items():
                self._watch_code(cls, name, value)
            if record.children_read:
                self.watch_children(record.module)
        self._check(root.__dict__, "forward", MISSING)
        self._watch_forward(root)
        for path in self.opened:
            self.watch_module(tracer.by_path[path].module)
            self._watch_forward(tracer.by_path[path].module)

    @property
    def opened(self) -> set[str]:
        """Paths of the modules whose own steps are in the graph."""
        return self._tracer.entered

    @property
    def empty(self) -> set[str]:
        """Those of them that contribute no step: they hand their input through."""
        return self.opened - {path for stack in self._tracer.stacks.values() for path, _ in stack}

    @property
    def depends_on_training(self) -> bool:
        return any(name == "training" for _, name, _ in self._checks.values())

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return self._tracer.by_path[str(node.target)].module

    def member(self, node: fx.Node, name: str) -> Any:
        """A plain attribute of the module that a node calls, on which the graph now depends."""
        record = self._tracer.by_path[str(node.target)]
        value = record.before.get(name, MISSING)
        self._check(record.module.__dict__, name, freeze(value) if value is not MISSING else value)
        return value

    def stack(self, node: fx.Node) -> tuple[tuple[str, int], ...]:
        """The opened calls that a node lies in, outermost first."""
        return self._tracer.stacks.get(node, ())

    def watch_module(self, module: nn.Module) -> None:
        """Hooks or a forward of its own on ``module`` end the validity of the graph."""
        self._check(module.__dict__, "forward", MISSING)
        for name in HOOKS:
            hooks = module.__dict__[name]
            self._hooks[id(hooks)] = hooks

    def _watch_forward(self, module: nn.Module) -> None:
        """The code itself may be replaced on its class, or branch on a constant of its file."""
        for cls, value in class_attribute(original_class(module), "forward") or ():
            self._watch_code(cls, "forward", value)

    def _watch_code(self, cls: type, name: str, value: Any) -> None:
        self._checks[cls, name] = (vars(cls), name, value)
        if not isinstance(value, types.FunctionType) or cls.__module__.startswith("torch."):
            return
        for used in value.__code__.co_names:
            constant = value.__globals__.get(used)
            if isinstance(constant, (bool, int, float, str)):
                self._check(value.__globals__, used, constant)

    def watch_children(self, module: nn.Module) -> None:
        children = module._modules
        self._sizes[id(children)] = (children, len(children))
        for name, child in children.items():
            self._check(children, name, child)

    def _check(self, owner: Any, name: str, value: Any) -> None:
        self._checks[id(owner), name] = (owner, name, value)

    def guards(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Attributes and their values, dicts and their sizes, and hook dicts that must be empty."""
        return (
            tuple(self._checks.values()),
            tuple(self._sizes.values()),
            tuple(self._hooks.values()),
        )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    members = module.__dict__
    return "forward" in members or any(members.get(name) for name in HOOKS)


def _is_leaf(module: nn.Module) -> bool:
    cls = original_class(module)
    return (
        (cls.__module__.startswith("torch.") and cls is not nn.Sequential)
        or cls.__module__ == __package__ + ".modules"
        or isinstance(module, (_NormBase, _ConvNd, torch.jit.ScriptModule, fx.GraphModule))
        or is_hooked(module)
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def _stand_in(tracer: Tracer, name: str, kind: Kind) -> Any:
    node = tracer.create_proxy("placeholder", name, (), {})
    if isinstance(kind, tuple):
        return kind[1]
    tracer.kinds[node.node] = kind
    return node


@contextmanager
def _no_functions() -> Iterator[None]:
    """Refuses autograd Functions of stand-ins: torch before 2.14 hands them on to code that takes
    whatever calls itself a tensor for one, and ends the process."""
    utils = torch._functorch.utils
    unwrap = getattr(utils, "unwrap_dead_wrappers", None)
    if unwrap is None:
        yield
        return

    def checked(args: tuple[Any, ...]) -> Any:
        if any(issubclass(type(arg), Proxy) for arg in args):
            raise TracingError("it calls an autograd Function")
        return unwrap(args)

    utils.unwrap_dead_wrappers = checked
    try:
        yield
    finally:
        utils.unwrap_dead_wrappers = unwrap


def _run(tracer: Tracer, root: nn.Module, shadow: Any, signature: Signature) -> None:
    grad, _, autocast, _ = tracer.modes
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", enabled=autocast),
        no_random_numbers(),
        _no_functions(),
        NoConstants(),
    ):
        args = [_stand_in(tracer, f"preact_arg_{i}", k) for i, k in enumerate(signature.args)]
        kwargs = {name: _stand_in(tracer, name, kind) for name, kind in signature.kwargs}
        result = original_class(root).forward(shadow, *args, **kwargs)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
    check_unchanged(tracer.records.values())


_RUN_CODE = _run.__code__


def trace(
    root: nn.Module,
    signature: Signature,
    expand: Collection[str] | None = None,
    closed: Collection[str] = (),
    training: bool | None = None,
    changed_modes: bool = False,
) -> Trace:
    """The graph of ``root``'s forward for arguments of the kinds in ``signature``.

    Args:
        root: the block; it is not touched.
        expand: paths of the modules below it whose own steps are wanted, None for all that can be
            opened. Every other module below is one step.
        closed: paths that are never opened.
        training: stands in for every module's ``training`` flag, unless None.
        changed_modes: trace with gradients and autocast the other way round.

    Raises:
        TracingError: with the reason, for whatever cannot be a graph that stays right.
    """
    tracer = Tracer()
    if changed_modes:
        grad, inference, autocast, other = tracer.modes
        tracer.modes = (not grad, inference, not autocast, other)

    def leaf(module: nn.Module, path: str) -> bool:
        wanted = expand is None or path in expand
        return path in closed or not wanted or _is_leaf(module)

    try:
        shadow = make_shadow(tracer, root, "", leaf, training, tracer.records)
        tracer.by_path = {record.path: record for _, record in tracer.records.values()}
        _run(tracer, root, shadow, signature)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, TracingError):
            reason = f"{type(error).__name__}: {reason}"
        guards = Trace(tracer, root, signature).guards()
        raise TracingError(reason, guards) from error
    return Trace(tracer, root, signature)
