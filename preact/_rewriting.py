"""Puts fused calls into a traced graph and makes a Python function of it."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Graph, Node

from . import calls, folded_units
from ._dense_block import DenseBlock
from ._matching import Matches, Unit
from ._prefix import Prefix

_serial = itertools.count()


def _erase(graph: Graph, nodes: Iterable[Node]) -> None:
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted(nodes, key=position.__getitem__, reverse=True):
        graph.erase_node(node)


def _reference(graph: Graph, call: Node) -> Node:
    """The module itself that ``call`` calls."""
    return graph.create_node("get_attr", str(call.target))


def _insert_prefix(graph: Graph, prefix: Prefix, options: dict[str, Any]) -> None:
    with graph.inserting_before(prefix.norm):
        norm = _reference(graph, prefix.norm)
        if prefix.pool is not None:
            convs = [_reference(graph, conv) for conv in prefix.convs]
            whole = (prefix.input, norm, convs, prefix.pool.windows)
            results = {prefix.pool.node: graph.call_function(calls.fused_pooled_prefix, whole)}
        elif not prefix.convs:
            fused = graph.call_function(calls.fused_batch_norm_relu, (norm, prefix.input))
            results = {prefix.activation: fused}
        else:
            convs = [_reference(graph, conv) for conv in prefix.convs]
            args = (prefix.input, norm, convs)
            fused = graph.call_function(calls.fused_prefix, args, dict(options))
            results = {
                conv: graph.call_function(operator.getitem, (fused, i))
                for i, conv in enumerate(prefix.convs)
            }
    for old, new in results.items():
        old.replace_all_uses_with(new)
    _erase(graph, prefix.nodes)


def _insert_unit(graph: Graph, unit: Unit, options: dict[str, Any]) -> None:
    with graph.inserting_before(unit.prefixes[0].norm):
        layers = [
            (
                _reference(graph, prefix.norm),
                _reference(graph, next(c for c in prefix.convs if c is not unit.projection)),
            )
            for prefix in unit.prefixes
        ]
        projection = unit.projection and _reference(graph, unit.projection)
        args = (unit.input, layers, projection)
        function = folded_units.folded_unit if unit.folds else calls.fused_unit
        fused = graph.call_function(function, args, dict(options))
        result = graph.call_function(operator.getitem, (fused, 0))
    unit.add.replace_all_uses_with(result)
    _erase(graph, unit.nodes)


def _insert_dense_block(graph: Graph, block: DenseBlock, options: dict[str, Any]) -> None:
    with graph.inserting_before(block.prefixes[0].norm):
        layers = [
            tuple(
                _reference(graph, call)
                for prefix in layer
                for call in (prefix.norm, prefix.convs[0])
            )
            for layer in block.layers
        ]
        args = (block.input, layers)
        fused = graph.call_function(calls.fused_dense_block, args, dict(options))
    block.output.replace_all_uses_with(fused)
    _erase(graph, block.nodes)


def rewrite(graph: Graph, matches: Matches, save_activation: bool) -> None:
    """Replace everything matched by calls of ``preact.calls``, each where its first norm stood.

    A norm, and with it the update of its running statistics, keeps its place among the other
    operations; its convolutions read nothing but the activation and can move up to it.
    """
    options = {"save_activation": True} if save_activation else {}
    for prefix in matches.prefixes:
        _insert_prefix(graph, prefix, options)
    for unit in matches.units:
        _insert_unit(graph, unit, options)
    for block in matches.dense_blocks:
        _insert_dense_block(graph, block, options)


def to_function(graph: Graph, name: str) -> Callable[..., Any]:
    """The graph as a function of the block and its arguments; tracebacks show its source."""
    code = graph.python_code("self")
    filename = f"<preact {name} {next(_serial)}>"
    lines = code.src.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.src), None, lines, filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function
