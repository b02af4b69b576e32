"""Finds convolutions whose result one batch norm alone reads, and puts the folded call there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from ._matching import Matcher, Matches, norm_reason
from ._tracing import Trace, is_hooked
from .folded import ALWAYS, WHERE_FASTER, folded_conv2d
from .folded_chain import folded_chain

NOTHING_BEFORE = "no convolution that it alone reads stands before it"


class Fold(NamedTuple):
    conv: Node
    norm: Node | None
    """None at the end of a chain, where no norm that can be folded follows."""
    activation: Node | None
    """The ReLU's result, where nothing but it reads the norm's."""
    nodes: list[Node]
    reader: Node | None = None
    """The convolution that alone reads the activation."""

    @property
    def result(self) -> Node:
        return self.activation or self.norm or self.conv


@dataclass
class Folds:
    """What can be folded in one graph, and why other batch norms cannot."""

    chains: list[list[Fold]] = field(default_factory=list)
    """Those outside units, which are marked as such; each reads what the one before it gives."""
    folded: dict[nn.Module, str] = field(default_factory=dict)
    unfolded: dict[nn.Module, str] = field(default_factory=dict)


def find_folds(trace: Trace, matches: Matches) -> Folds:
    """What can be folded in evaluation; the prefixes that this takes are removed from ``matches``.

    Dense blocks keep their norms, and so do a norm that runs with a pooling behind it and one
    behind a convolution that runs with the norm before it: a prefix is worth more.
    """
    found = Folds()
    matcher = Matcher(trace)
    calls = Counter(map(trace.module, trace.graph.nodes))
    taken: dict[Node, str] = {}
    for unit in matches.units:
        inner = [prefix.norm for prefix in unit.prefixes[1:]]
        if inner and not any(trace.member(node, "training") for node in inner):
            unit.folds = True
            found.folded.update((_module(trace, node), WHERE_FASTER) for node in inner)
        taken |= dict.fromkeys(unit.nodes, NOTHING_BEFORE)
    for block in matches.dense_blocks:
        taken |= dict.fromkeys(block.nodes, "a dense block's kernels apply it without a pass")
    by_norm = {prefix.norm: prefix for prefix in matches.prefixes}
    folds: list[Fold] = []
    for norm in trace.graph.nodes:
        module = trace.module(norm)
        if not isinstance(module, _BatchNorm) or module in found.folded:
            continue
        reason = taken.get(norm) or _reason(trace, matcher, matches, calls, norm)
        if reason is not None:
            found.unfolded[module] = reason
            continue
        conv = norm.args[0]
        trace.watch_module(module)
        trace.watch_module(_module(trace, conv))
        found.folded[module] = ALWAYS
        prefix = by_norm.get(norm)
        if prefix is None:
            folds.append(Fold(conv, norm, None, [conv, norm]))
            continue
        matches.prefixes.remove(prefix)
        nodes = [conv, norm, *prefix.inside, prefix.activation]
        reader = prefix.convs[0] if len(prefix.convs) == 1 else None
        if reader is not None:
            nodes += prefix.between
        folds.append(Fold(conv, norm, prefix.activation, nodes, reader))
    found.chains = _chains(folds)
    for chain in found.chains:
        if len(chain) > 1:
            norms = [_module(trace, fold.norm) for fold in chain if fold.norm is not None]
            found.folded.update(dict.fromkeys(norms, WHERE_FASTER))
    return found


def _chains(folds: list[Fold]) -> list[list[Fold]]:
    """Each fold with those that read its result in turn, and a last convolution."""
    by_conv = {fold.conv: fold for fold in folds}
    chains: list[list[Fold]] = []
    inside: set[Node] = set()
    for fold in folds:  # in the graph's order, so that a chain's first comes first
        if fold.conv in inside:
            continue
        chain = [fold]
        while (reader := chain[-1].reader) is not None:
            chain.append(by_conv.get(reader) or Fold(reader, None, None, [reader]))
            inside.add(reader)
        chains.append(chain)
    return chains


def _module(trace: Trace, node: Node) -> nn.Module:
    module = trace.module(node)
    assert module is not None
    return module


def _reason(
    trace: Trace,
    matcher: Matcher,
    matches: Matches,
    calls: Counter[nn.Module | None],
    norm: Node,
) -> str | None:
    """Why a norm that is part of nothing larger cannot be folded."""
    module = _module(trace, norm)
    if type(module) is not nn.BatchNorm2d:
        return norm_reason(module) or f"{type(module).__name__} is not nn.BatchNorm2d itself"
    if calls[module] > 1:
        return f"called {calls[module]} times in one forward"
    if is_hooked(module):
        return "a hook is registered on it"
    conv = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
    if not isinstance(conv, Node) or not matcher.is_conv(conv) or len(conv.users) != 1:
        return NOTHING_BEFORE
    if any(norm is prefix.norm and prefix.pool is not None for prefix in matches.prefixes):
        return "it runs in one pass with the ReLU and the pooling behind it"
    if any(conv in prefix.convs for prefix in matches.prefixes):
        return "the convolution before it runs with the norm before that"
    before = _module(trace, conv)
    if torch.nn.utils.parametrize.is_parametrized(before):
        return "the weight before it is made anew at every call"
    if calls[before] > 1:
        return f"the convolution before it is called {calls[before]} times in one forward"
    return "it is in training" if trace.member(norm, "training") else None


def insert_folds(graph: Graph, chains: list[list[Fold]]) -> None:
    """Each where its first convolution stands: what follows reads nothing else."""
    for chain in chains:
        first, last = chain[0], chain[-1]
        with graph.inserting_before(first.conv):
            links = [
                (
                    graph.create_node("get_attr", str(fold.conv.target)),
                    fold.norm and graph.create_node("get_attr", str(fold.norm.target)),
                    fold.activation is not None,
                )
                for fold in chain
            ]
            if len(chain) > 1:
                result = graph.call_function(folded_chain, (first.conv.args[0], links))
            else:
                result = graph.call_function(folded_conv2d, (first.conv.args[0], *links[0]))
        last.result.replace_all_uses_with(result)
        nodes = {node for fold in chain for node in fold.nodes}
        for node in reversed([node for node in graph.nodes if node in nodes]):
            graph.erase_node(node)
