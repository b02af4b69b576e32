"""Which convolutions run fused with their prefix, and which as the library's between our passes."""

from __future__ import annotations

from torch import Tensor

from .backends import cpp

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""


def fuses_convolution(input: Tensor, weight: Tensor, geometry: Geometry, work: str) -> bool:
    """Whether ``weight`` convolves the BN-ReLU of ``input`` in a kernel of our own.

    ``work`` is "forward", "forward with statistics" of the result, or "backward"; each is chosen by
    itself, as none needs what another leaves.
    """
    return input.device.type == "cpu" and cpp.prefers_direct(input, weight, geometry, work)
