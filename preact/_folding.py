"""Finds convolutions whose result one batch norm alone reads, and puts the folded call there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node

from ._folded import folded_conv2d
from ._matching import (
    BATCH_NORM_RELU,
    POOLED,
    POOLED_PREFIX,
    PREFIX,
    SHARED_PREFIX,
    Matcher,
    Matches,
    norm_reason,
)
from ._tracing import Trace, is_hooked

_SINGLE = (BATCH_NORM_RELU, PREFIX, SHARED_PREFIX, POOLED, POOLED_PREFIX)


class Fold(NamedTuple):
    conv: Node
    norm: Node
    activation: Node | None
    """The ReLU's result, where nothing but it reads the norm's."""
    nodes: list[Node]


def find_folds(trace: Trace, matches: Matches) -> list[Fold]:
    """What can be folded in evaluation; the prefixes that this takes are removed from ``matches``.

    Whole units and dense blocks keep their norms, and so does a norm behind a convolution that runs
    with the norm before it: a prefix is worth more.
    """
    matcher = Matcher(trace)
    taken = {node for kind, _, nodes in matches.groups() for node in nodes if kind not in _SINGLE}
    by_norm = {prefix.norm: prefix for prefix in matches.prefixes}
    calls = [trace.module(node) for node in trace.graph.nodes]
    found: list[Fold] = []
    for norm in trace.graph.nodes:
        module = trace.module(norm)
        if type(module) is not nn.BatchNorm2d or norm in taken or calls.count(module) > 1:
            continue
        conv = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
        if not isinstance(conv, Node) or len(conv.users) != 1 or not matcher.is_conv(conv):
            continue
        if any(conv in prefix.convs for prefix in matches.prefixes):
            continue  # it runs with the norm before it
        before = trace.module(conv)
        assert before is not None
        changes = torch.nn.utils.parametrize.is_parametrized(before)  # its weight at every call
        if changes or calls.count(before) > 1 or is_hooked(module) or norm_reason(module):
            continue
        if trace.member(norm, "training"):
            continue
        trace.watch_module(module)
        trace.watch_module(before)
        prefix = by_norm.get(norm)
        if prefix is None:
            found.append(Fold(conv, norm, None, [conv, norm]))
            continue
        matches.prefixes.remove(prefix)
        found.append(
            Fold(conv, norm, prefix.activation, [conv, norm, *prefix.inside, prefix.activation])
        )
    return found


def insert_folds(graph: Graph, folds: list[Fold]) -> None:
    """Each where its convolution stands: norm and ReLU read nothing else."""
    for fold in folds:
        with graph.inserting_before(fold.conv):
            modules = [graph.create_node("get_attr", str(n.target)) for n in (fold.conv, fold.norm)]
            args = (fold.conv.args[0], *modules, fold.activation is not None)
            result = graph.call_function(folded_conv2d, args)
        (fold.activation or fold.norm).replace_all_uses_with(result)
        for node in reversed(fold.nodes):
            graph.erase_node(node)
