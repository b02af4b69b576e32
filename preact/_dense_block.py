"""Finds dense blocks in a traced graph, by its edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ._prefix import Prefix

_CAT_FUNCTIONS = {torch.cat, torch.concat, torch.concatenate}


@dataclass
class DenseBlock:
    """Layers of two prefixes, each reading a concatenation of all features before it."""

    input: Node
    layers: list[tuple[Prefix, Prefix]]
    between: list[Node]
    """The concatenations that layers read, and transparent nodes between their parts."""
    output: Node
    """The concatenation of everything."""

    @property
    def prefixes(self) -> list[Prefix]:
        return [prefix for layer in self.layers for prefix in layer]

    @property
    def nodes(self) -> list[Node]:
        chain = [node for prefix in self.prefixes for node in prefix.nodes]
        return [*chain, *self.between, self.output]


def _concatenated(node: Any) -> list[Any] | None:
    """What a concatenation along the channels joins."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target not in _CAT_FUNCTIONS:
        return None
    named = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors = named.pop("tensors", None)
    if list(named.values()) not in ([1], [-3]) or not isinstance(tensors, (list, tuple)):
        return None
    return list(tensors)


def find_dense_block(
    output: Node,
    by_conv: Mapping[Node, Prefix],
    back: Callable[[Any], tuple[Any, list[Node]]],
) -> DenseBlock | None:
    """The dense block whose last concatenation is ``output``.

    Args:
        by_conv: each convolution's prefix.
        back: leads from a node through transparent ones to the one whose result it is.
    """
    features = _concatenated(output)
    if features is None or len(features) < 2 or not isinstance(features[0], Node):
        return None
    layers: list[tuple[Prefix, Prefix]] = []
    between: list[Node] = []
    readers = {output}
    for index in range(1, len(features)):
        chain: list[Prefix] = []
        end = features[index]
        for _ in range(2):
            conv, passed = back(end)
            prefix = by_conv.get(conv) if isinstance(conv, Node) else None
            if prefix is None or len(prefix.convs) != 1:
                return None
            # All but the layer's own features have one reader, the next step.
            inner = [conv, *passed] if chain else [n for n in (conv, *passed) if n is not end]
            if any(len(n.users) != 1 for n in inner):
                return None
            between += passed
            chain.insert(0, prefix)
            end = prefix.input
        if end is not features[0] or index > 1:
            if _concatenated(end) != features[:index] or len(end.users) != 1:
                return None
            between.append(end)
            readers.add(end)
        layers.append((chain[0], chain[1]))
    if any(set(node.users) - readers for node in features[1:]):
        return None
    return DenseBlock(features[0], layers, between, output)
