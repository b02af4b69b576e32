"""Recognises poolings in a traced graph that can run with the batch norm and ReLU before them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ._tracing import Trace, is_hooked

Pair = tuple[int, int]
_MOST_OF_A_WINDOW = 64


class PoolCall(NamedTuple):
    node: Node
    windows: tuple[Pair, Pair, Pair, bool]
    """Kernel, stride and padding, and whether the mean is taken; as ``arguments.Pool``."""


def _pair(value: Any) -> Pair | None:
    if type(value) is int:
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int for v in value):
        return (value[0], value[1])
    return None


_DEFAULTS: dict[str, Any] = {
    "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True,
    "divisor_override": None,
}  # fmt: skip
_OF_AVERAGE = ("kernel_size", *_DEFAULTS)
_OF_MAXIMUM = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _options(trace: Trace, node: Node) -> tuple[dict[str, Any], bool] | None:
    """What a pooling is called with, and whether it takes the mean; None for everything else."""
    module = trace.module(node)
    if module is not None:
        average = type(module) is nn.AvgPool2d
        is_pool = average or type(module) is nn.MaxPool2d
        if not is_pool or is_hooked(module) or len(node.args) != 1 or node.kwargs:
            return None
        names = _OF_AVERAGE if average else _OF_MAXIMUM
        return {name: trace.member(node, name) for name in names}, average
    if node.op != "call_function" or node.target is not F.avg_pool2d:
        return None
    named = dict(zip(("input", *_OF_AVERAGE), node.args, strict=False)) | node.kwargs
    del named["input"]
    return _DEFAULTS | named, True


def pool_call(trace: Trace, node: Node) -> PoolCall | None:
    """The pooling that a node is, None for one whose windows may be cut short or have holes."""
    found = _options(trace, node)
    if found is None:
        return None
    options, average = found
    kernel = _pair(options.get("kernel_size"))
    stride = kernel if options["stride"] in (None, (), []) else _pair(options["stride"])
    padding = _pair(options["padding"])
    if kernel is None or stride is None or padding is None:
        return None
    if options["ceil_mode"] or options.get("return_indices"):
        return None
    if _pair(options.get("dilation", 1)) != (1, 1) or options.get("divisor_override") is not None:
        return None
    if kernel[0] * kernel[1] > _MOST_OF_A_WINDOW or min(*kernel, *stride) < 1:
        return None
    if average and padding != (0, 0):
        return None
    return PoolCall(node, (kernel, stride, padding, average))


def is_pointwise(trace: Trace, conv: Node) -> bool:
    """Whether a convolution takes each pixel by itself, so that a mean may be taken before it."""
    return (
        _pair(trace.member(conv, "kernel_size")) == (1, 1)
        and _pair(trace.member(conv, "stride")) == (1, 1)
        and _pair(trace.member(conv, "padding")) == (0, 0)
    )


def pool_behind(trace: Trace, activation: Node, convs: list[Node]) -> PoolCall | None:
    """The pooling that alone reads the activation, or as a mean the one convolution of it."""
    if len(convs) > 1 or (convs and not is_pointwise(trace, convs[0])):
        return None
    last = convs[0] if convs else activation
    if len(last.users) != 1:
        return None
    call = pool_call(trace, next(iter(last.users)))
    if call is None or (convs and not call.windows[3]):
        return None
    source = call.node.args[0] if call.node.args else None
    return call if source is last else None
