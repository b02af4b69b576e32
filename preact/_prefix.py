"""A prefix in a traced graph: what every larger thing to fuse is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ._pooling import PoolCall

BATCH_NORM_RELU = "batch_norm_relu"
PREFIX = "batch_norm_relu_conv2d"
SHARED_PREFIX = "batch_norm_relu_convs2d"
POOLED = "batch_norm_relu_pool2d"
POOLED_PREFIX = "batch_norm_relu_conv2d_pool2d"


@dataclass
class Prefix:
    """Batch norm, ReLU and the convolutions that read the activation, or none of these."""

    norm: Node
    activation: Node
    """The node whose result is the activation: the ReLU, or a norm with ReLU built in."""
    inside: list[Node] = field(default_factory=list)
    """Identities and inactive dropouts between norm and ReLU."""
    between: list[Node] = field(default_factory=list)
    """The same between ReLU and convolutions, in graph order; empty without convolutions."""
    convs: list[Node] = field(default_factory=list)
    pool: PoolCall | None = None
    """What alone reads the activation, or the one convolution of it."""

    @property
    def input(self) -> Node:
        return self.norm.args[0]  # type: ignore[return-value]

    @property
    def nodes(self) -> list[Node]:
        relu = [] if self.activation is self.norm else [self.activation]
        pool = [] if self.pool is None else [self.pool.node]
        return [self.norm, *self.inside, *relu, *self.between, *self.convs, *pool]

    @property
    def kind(self) -> str:
        if self.pool is not None:
            return POOLED_PREFIX if self.convs else POOLED
        return (BATCH_NORM_RELU, PREFIX, SHARED_PREFIX)[min(len(self.convs), 2)]
