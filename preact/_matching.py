"""Finds what can be fused in a traced block: by the graph's edges, never by names.

The pattern is ``batch_norm -> relu -> (identity | inactive dropout)* -> conv2d``. Where the
activation has other users than convolutions, batch norm and ReLU alone are fused and the
activation stays available. A pooling that alone reads the activation is fused with it, and so is a
mean behind a pointwise convolution. Where a chain of prefixes ends in an addition of the chain's
input, or of a convolution of its first activation, the whole residual unit is fused; where layers
of two prefixes read all features before them, and these are concatenated, the whole dense block is.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ._dense_block import DenseBlock, find_dense_block
from ._pooling import pool_behind
from ._prefix import Prefix
from ._shadow import original_class
from ._tracing import Trace, is_hooked

UNIT = "residual_unit"
DENSE_BLOCK = "dense_block"

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_DROPOUT_FUNCTIONS = {F.dropout, F.dropout2d}
_DROPOUTS = (nn.Dropout, nn.Dropout2d)
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_PURE_FUNCTIONS = _RELU_FUNCTIONS - {F.relu_, torch.relu_} | {
    operator.add,
    operator.getitem,
    torch.cat,
}


@dataclass
class Unit:
    """A residual unit: prefixes in a row and the addition of the shortcut."""

    prefixes: list[Prefix]
    projection: Node | None
    add: Node
    between: list[Node]
    folds: bool = False
    """Whether its inner norms may be folded into the convolutions before them."""

    @property
    def input(self) -> Node:
        return self.prefixes[0].input

    @property
    def nodes(self) -> list[Node]:
        chain = [node for prefix in self.prefixes for node in prefix.nodes]
        return [*chain, *self.between, self.add]


@dataclass
class Matches:
    """All that can be fused in one graph, and why each other batch norm cannot."""

    prefixes: list[Prefix] = field(default_factory=list)
    """Those that are not part of a unit or of a dense block."""
    units: list[Unit] = field(default_factory=list)
    dense_blocks: list[DenseBlock] = field(default_factory=list)
    reasons: dict[nn.Module, str] = field(default_factory=dict)

    def groups(self) -> list[tuple[str, list[Prefix], list[Node]]]:
        """Kind, prefixes and all nodes of each thing to fuse."""
        single = [(prefix.kind, [prefix], prefix.nodes) for prefix in self.prefixes]
        units = [(UNIT, unit.prefixes, unit.nodes) for unit in self.units]
        dense = [(DENSE_BLOCK, block.prefixes, block.nodes) for block in self.dense_blocks]
        return single + units + dense


def norm_reason(module: nn.Module) -> str | None:
    """Why a normalisation layer can never be fused, None for a batch norm that may be."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if not isinstance(module, nn.BatchNorm2d):
        return f"{type(module).__name__} is not BatchNorm2d"
    cls = original_class(module)
    if cls.forward is not _BatchNorm.forward and not _is_norm_act(module):
        return f"{type(module).__name__} has a forward of its own"
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether the report accounts for ``module``."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    name = getattr(module, "original_name", type(module).__name__)  # as TorchScript keeps it
    return "BatchNorm" in name and next(module.children(), None) is None


def _is_norm_act(module: nn.Module) -> bool:
    """timm's BatchNormAct2d, which need not be installed: batch norm, ``drop``, then ``act``."""
    cls = original_class(module)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.split(".")[0] == "timm"


def _conv_reason(module: nn.Module | None) -> str | None:
    """Why a module is not a convolution that can be fused."""
    if module is None:
        return "no convolution"
    cls = original_class(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    if cls is not nn.Conv2d:
        return "not nn.Conv2d itself"
    if is_hooked(module):
        return "hooked"
    return None if module.padding_mode == "zeros" else "padding_mode"


class Matcher:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = {node: i for i, node in enumerate(trace.graph.nodes)}
        self.found = Matches()

    def module(self, node: Node) -> nn.Module | None:
        return self.trace.module(node)

    def is_conv(self, node: Node) -> bool:
        module = self.module(node)
        if _conv_reason(module) is not None or len(node.args) != 1 or node.kwargs:
            return False
        return bool(self.trace.member(node, "padding_mode") == "zeros")

    def is_relu(self, node: Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def is_transparent(self, node: Node) -> bool:
        """Whether a node returns its input itself: an identity, or a dropout that drops nothing."""
        module = self.module(node)
        if module is not None:
            if is_hooked(module) or len(node.args) != 1 or node.kwargs:
                return False
            if type(module) is nn.Identity:
                return True
            if type(module) not in _DROPOUTS:
                return False
            p, training = self.trace.member(node, "p"), self.trace.member(node, "training")
            return bool(p == 0 or not training)
        if node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS:
            return False
        named = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        p, training = named.get("p", 0.5), named.get("training", True)
        if not node.args or isinstance(p, Node) or isinstance(training, Node):
            return False
        return bool(p == 0 or not training)

    def describe(self, node: Node) -> str:
        if node.op == "output":
            return "the end of the block"
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        return getattr(node.target, "__name__", str(node.target))

    def prefix(self, norm: Node) -> Prefix | str:
        """The prefix that starts at a batch norm, or why there is none."""
        module = self.module(norm)
        assert module is not None
        reason = norm_reason(module)
        if reason is not None:
            return reason
        if is_hooked(module):
            return "a hook is registered on it"
        if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], Node):
            return "it is not called with one tensor"
        if _is_norm_act(module):
            act, drop = module.get_submodule("act"), module.get_submodule("drop")
            self.trace.watch_children(module)
            if type(drop) is not nn.Identity or type(act) not in (nn.ReLU, nn.Identity):
                inner = act if type(drop) is nn.Identity else drop
                return f"{type(inner).__name__} inside it is not ReLU"
            if is_hooked(drop) or is_hooked(act):
                return "a hook is registered inside it"
            self.trace.watch_module(drop)
            self.trace.watch_module(act)
            if type(act) is nn.ReLU:
                return self.with_readers(Prefix(norm, norm))
        relu = norm
        inside: list[Node] = []
        while not inside or self.is_transparent(relu):
            if len(relu.users) != 1:
                return f"its result has {len(relu.users)} uses, where one ReLU was expected"
            relu = next(iter(relu.users))
            inside.append(relu)
        if not self.is_relu(relu):
            return f"followed by {self.describe(relu)}, not by ReLU"
        relu_module = self.module(relu)
        if relu_module is not None and is_hooked(relu_module):
            return "a hook is registered on its ReLU"
        return self.with_readers(Prefix(norm, relu, inside[:-1]))

    def with_readers(self, prefix: Prefix) -> Prefix:
        """Adds the convolutions, and a pooling behind what there is then."""
        prefix = self.with_convs(prefix)
        prefix.pool = pool_behind(self.trace, prefix.activation, prefix.convs)
        return prefix

    def with_convs(self, prefix: Prefix) -> Prefix:
        """Adds the convolutions, if the activation feeds nothing else."""
        between: list[Node] = []
        convs: list[Node] = []
        todo = [prefix.activation]
        while todo:
            for user in todo.pop().users:
                if self.is_transparent(user):
                    between.append(user)
                    todo.append(user)
                elif self.is_conv(user):
                    convs.append(user)
                else:
                    return prefix
        if convs:
            prefix.between = sorted(between, key=self.order.__getitem__)
            prefix.convs = sorted(convs, key=self.order.__getitem__)
        return prefix

    def back(self, node: Any) -> tuple[Any, list[Node]]:
        """The node whose result this is, through transparent ones, and these."""
        passed = []
        while isinstance(node, Node) and self.is_transparent(node):
            passed.append(node)
            node = node.args[0]
        return node, passed

    def operands(self, node: Node) -> tuple[Any, Any] | None:
        """The two summands of an addition, the one that may be overwritten first."""
        function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (function or method) or len(node.args) != 2 or node.kwargs:
            return None
        return node.args[0], node.args[1]

    def unit(self, add: Node, by_conv: dict[Node, Prefix]) -> Unit | None:
        """The residual unit that an addition ends."""
        operands = self.operands(add)
        if operands is None:
            return None
        overwrites = add.target in (operator.iadd, "add_")
        for side in (0,) if overwrites else (0, 1):
            unit = self.unit_from(add, operands[side], operands[1 - side], by_conv)
            if unit is not None and self.movable(unit.nodes):
                return unit
        return None

    def unit_from(
        self, add: Node, end: Any, shortcut: Any, by_conv: dict[Node, Prefix]
    ) -> Unit | None:
        origin, passed = self.back(shortcut)
        prefixes: list[Prefix] = []
        between: list[Node] = []
        while True:
            conv, skipped = self.back(end)
            prefix = by_conv.get(conv) if isinstance(conv, Node) else None
            if prefix is None or any(len(n.users) != 1 for n in (conv, *skipped)):
                return None
            prefixes.insert(0, prefix)
            between += skipped
            if len(prefix.convs) == 2 and by_conv.get(origin) is prefix and origin is not conv:
                if any(len(n.users) != 1 for n in (origin, *passed)):
                    return None
                return Unit(prefixes, origin, add, between + passed)
            if len(prefix.convs) != 1:
                return None
            if self.back(prefix.input)[0] is origin:
                return Unit(prefixes, None, add, between)
            end = prefix.input

    def movable(self, nodes: list[Node]) -> bool:
        """Whether ``nodes`` may run as a whole where the first of them stands.

        Anything in between that may write to their input would be overtaken.
        """
        own = set(nodes)
        places = [self.order[node] for node in nodes]
        first, last = min(places), max(places)
        between = [n for n, i in self.order.items() if first < i < last and n not in own]
        return all(self.is_pure(node) for node in between)

    def is_pure(self, node: Node) -> bool:
        """Whether a node is known to write to none of its arguments."""
        module = self.module(node)
        if module is not None:
            torch_own = original_class(module).__module__.startswith("torch.nn.")
            return torch_own and not is_hooked(module) and not getattr(module, "inplace", False)
        if node.op == "call_function":
            return node.target in _PURE_FUNCTIONS and "inplace" not in node.kwargs
        return node.op in ("get_attr", "placeholder")

    def run(self) -> Matches:
        norms = [n for n in self.trace.graph.nodes if isinstance(self.module(n), _BatchNorm)]
        calls = Counter(self.module(n) for n in norms)
        prefixes: list[Prefix] = []
        for node in norms:
            module = self.module(node)
            assert module is not None
            if calls[module] > 1:
                result: Prefix | str = f"called {calls[module]} times in one forward"
            else:
                result = self.prefix(node)
            if isinstance(result, str):
                self.found.reasons[module] = result
            else:
                prefixes.append(result)
        by_conv = {conv: prefix for prefix in prefixes for conv in prefix.convs}
        taken: set[int] = set()
        for node in self.trace.graph.nodes:
            unit = self.unit(node, by_conv)
            if unit is not None and not any(id(p) in taken for p in unit.prefixes):
                taken.update(id(p) for p in unit.prefixes)
                self.found.units.append(unit)
        for node in reversed(self.trace.graph.nodes):  # a block's last concatenation comes first
            dense = find_dense_block(node, by_conv, self.back)
            if (
                dense is not None
                and not any(id(p) in taken for p in dense.prefixes)
                and self.movable(dense.nodes)
            ):
                taken.update(id(p) for p in dense.prefixes)
                self.found.dense_blocks.append(dense)
        self.found.prefixes = [p for p in prefixes if id(p) not in taken]
        self.watch()
        return self.found

    def watch(self) -> None:
        """A hook on a module that fused code passes over must bring the modules' calls back."""
        for _, _, nodes in self.found.groups():
            for node in nodes:
                module = self.module(node)
                if module is not None:
                    self.trace.watch_module(module)


def match(trace: Trace) -> Matches:
    """What can be fused in ``trace``, whose guards it completes."""
    return Matcher(trace).run()
