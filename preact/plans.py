"""Which convolutions run fused with their prefix, and which as the library's between our passes."""

from __future__ import annotations

from torch import Tensor

from .backends import cpp

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""


def fuses_convolution(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether ``weight`` convolves the BN-ReLU of ``input`` in a kernel of our own."""
    return input.device.type == "cpu" and cpp.prefers_direct(input, weight, geometry)
