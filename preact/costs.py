"""What a pre-activation unit costs by counting: passes, bytes, operations, and a predicted time.

A model, no measurement: a kernel takes the longer of moving its maps and multiplying, and a launch.
Bytes are those of feature maps and convolution weights; per-channel vectors and partial sums are
left out. ``plans`` decides by these numbers where nothing can be measured, and
``python -m benchmarks traffic`` prints them.

The plans, by what a two-conv unit of equal shapes reads and writes:

====== ======================================================================================
eager  every operation a pass of its own
A      BN and ReLU one pass, the addition with the statistics, mask with the BN's backward
B      as A, the activation computed again in backward
C      the convolution with BN and ReLU in its prologue and the statistics in its epilogue
D      as C, the addition in the convolution's epilogue
E      as D, the inner BN's gradient formed in the prologue of the convolution before
====== ======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PLANS = ("A", "B", "C", "D", "E")


class Gpu(NamedTuple):
    """A device by its maker's data sheet: dense rates, products of half types added in float32."""

    name: str
    capability: int
    bandwidth: float
    """Bytes a second."""
    half: float
    """Operations a second, two for each multiplication with its addition."""
    tf32: float
    float32: float


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80, 2.04e12, 312e12, 156e12, 19.5e12),
    "rtx3090": Gpu("GeForce RTX 3090", 86, 0.936e12, 71e12, 35.6e12, 35.6e12),
    "l4": Gpu("L4", 89, 0.3e12, 121e12, 60e12, 30.3e12),
    "rtx4090": Gpu("GeForce RTX 4090", 89, 1.008e12, 165e12, 82.6e12, 82.6e12),
    "h100": Gpu("H100 SXM", 90, 3.35e12, 989e12, 495e12, 67e12),
    "h200": Gpu("H200 SXM", 90, 4.8e12, 989e12, 495e12, 67e12),
    "b200": Gpu("B200", 100, 8.0e12, 2250e12, 1125e12, 75e12),
    "rtx5090": Gpu("GeForce RTX 5090", 120, 1.79e12, 209e12, 105e12, 105e12),
}

# Assumptions: shares of the data sheet's rates that a kernel reaches, and the seconds of a launch.
MEMORY_SHARE, PRODUCT_SHARE, LAUNCH = 0.85, 0.6, 3e-6
# How far our convolutions stand behind that: clocks of the matrix unit for each that the main loop
# takes to issue, at most 1. The worse of 3x3 64->64 and 64->128 in bfloat16, each with the better
# of its tiles, as benchmarks/results/binaries.csv counts them.
ISSUE_SHARE = {
    (80, False): (0.8, 1.0, 0.6, 1.0),
    (90, False): (0.4, 0.85, 0.35, 0.75),
    (100, True): (0.8, 0.85, 0.5, 0.6),
    (100, False): (0.3, 0.7, 0.2, 0.55),
}
"""By compute capability and whether a tile serves the taps of a row: forward, backward to the
input, to the weight, to the input with a pending gradient; 1 where not named."""
# Up to where each step of backward to the input forms a pending gradient itself: steps that meet an
# element of it, and products for each element that moves. Nowhere in benchmarks/LIMITS.md does a
# loop then issue, or move through shared memory, for longer than it waits for memory.
MOST_MEETS, MOST_PRODUCTS = 3, 60


class Kernel(NamedTuple):
    """One pass of one kernel: elements of maps read and written, and what it multiplies."""

    name: str
    reads: tuple[int, ...]
    """Elements of each map that is read."""
    writes: tuple[int, ...]
    products: int = 0
    weights: int = 0
    """Elements of the convolution's weight, read or written once."""
    own: int = -1
    """Which of our convolutions it is, an index into ``ISSUE_SHARE``; -1 for any other kernel."""
    by_rows: bool = False
    """Whether a tile of ours serves the taps of a row."""
    returned: int = 0
    """Elements that a program loads again which it has just stored: by the letter a pass more, but
    of a cache, so that neither ``elements`` nor the time has them."""

    @property
    def passes(self) -> int:
        return len(self.reads) + len(self.writes)

    @property
    def elements(self) -> int:
        return sum(self.reads) + sum(self.writes)

    def bytes(self, itemsize: int) -> int:
        return (self.elements + self.weights) * itemsize

    @property
    def operations(self) -> int:
        return 2 * self.products

    def seconds(self, gpu: Gpu, itemsize: int, tf32: bool = True) -> float:
        """Predicted, by the module's model."""
        rate = gpu.half if itemsize == 2 else gpu.tf32 if tf32 else gpu.float32
        shares = ISSUE_SHARE.get((gpu.capability, self.by_rows), (1.0,) * 4)
        share = shares[self.own] if self.own >= 0 else 1.0
        moving = self.bytes(itemsize) / (gpu.bandwidth * MEMORY_SHARE)
        return max(moving, self.operations / (rate * PRODUCT_SHARE * share)) + LAUNCH


class Layer(NamedTuple):
    """Elements of a BN-ReLU-conv's maps and of its weight, and the products of one direction."""

    input: int
    output: int
    weights: int
    products: int
    by_rows: bool = False
    """Whether it is three taps wide with stride 1, as our kernels by rows take it."""
    meets: int = 1
    """Steps of backward to the input that meet an element of the gradient."""

    @property
    def forms_at_steps(self) -> bool:
        """Whether each of these steps forms its part of a pending gradient, where nothing is
        measured; else it is formed once and stored, and loaded from there."""
        if self.meets > (MOST_MEETS if self.output <= self.input else 1):
            return False
        return self.products <= MOST_PRODUCTS * (3 * self.output + 2 * self.input)


def layer(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Layer:
    """The layer that convolves ``[N, C, H, W]`` with ``[O, C / groups, KH, KW]``."""
    batch, _, *image = input_shape
    outs, group_in, *kernel = weight_shape
    pixels = math.prod(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(image, kernel, stride, padding, dilation, strict=True)
    )
    output = batch * outs * pixels
    products = output * group_in * math.prod(kernel)
    by_rows = kernel[-1] == 3 and stride[-1] == 1
    meets = math.prod(kernel[:-1] if by_rows else kernel)
    return Layer(math.prod(input_shape), output, math.prod(weight_shape), products, by_rows, meets)


def library_forward(layer: Layer, statistics: bool = True, adds: bool = False) -> list[Kernel]:
    """BN-ReLU, the library's convolution, and a pass for statistics or addition of the result."""
    x, y = layer.input, layer.output
    found = [
        Kernel("batch_norm_relu", (x,), (x,)),
        Kernel("convolution", (x,), (y,), layer.products, layer.weights),
    ]
    if adds:
        found.append(Kernel("identity_add", (y, y), (y,)))
    elif statistics:
        found.append(Kernel("batch_norm_stats", (y,), ()))
    return found


def own_forward(layer: Layer, adds: bool = False, separate_add: bool = False) -> list[Kernel]:
    """The convolution with its prologue and epilogue; the addition in it or after it."""
    x, y = layer.input, layer.output
    reads = (x, y) if adds and not separate_add else (x,)
    name = "batch_norm_relu_conv2d"
    found = [Kernel(name, reads, (y,), layer.products, layer.weights, 0, layer.by_rows)]
    if adds and separate_add:
        found.append(Kernel("identity_add", (y, y), (y,)))
    return found


def library_backward(layer: Layer, keeps: bool = False, skip: bool = False) -> list[Kernel]:
    """The activation unless kept, the library's two gradients, the sums, the norm's gradient."""
    x, y = layer.input, layer.output
    found = [] if keeps else [Kernel("batch_norm_relu", (x,), (x,))]
    return [
        *found,
        Kernel("convolution backward input", (y,), (x,), layer.products, layer.weights),
        Kernel("convolution backward weight", (y, x), (), layer.products, layer.weights),
        Kernel("batch_norm_relu_backward_reduce", (x, x), ()),
        apply(layer.input, skip),
    ]


def own_backward(
    layer: Layer, skip: bool = False, pending: bool = False, leaves: bool = False
) -> list[Kernel]:
    """Both gradients by our kernels; ``pending``: formed from dz and the following norm's input,
    by the first of them for both, which loads what it stored where no step forms it.

    ``leaves``: this layer's own norm is left to the convolution before it.
    """
    x, y = layer.input, layer.output
    reads, writes = ((y, y, x), (x, y)) if pending else ((y, x), (x,))
    name = "batch_norm_relu_conv2d_backward"
    products = (layer.products, layer.weights)
    returned = y if pending and not layer.forms_at_steps else 0
    found = [
        Kernel(
            f"{name}_input", reads, writes, *products, 3 if pending else 1, layer.by_rows, returned
        ),
        Kernel(f"{name}_weight", (y, x), (), *products, 2, layer.by_rows),
    ]
    return found if leaves else [*found, apply(layer.input, skip)]


def apply(map: int, skip: bool = False) -> Kernel:
    """The gradient of a batch norm's input, a map of as many elements."""
    return Kernel("batch_norm_relu_backward_apply", (map,) * (3 if skip else 2), (map,))


def unit_forward(plan: str, layers: Sequence[Layer]) -> list[Kernel]:
    """A unit with an identity shortcut, its first statistics handed on; ``plan`` or "eager"."""
    found: list[Kernel] = []
    for index, layer in enumerate(layers):
        adds = index == len(layers) - 1
        if plan == "eager":
            x, y = layer.input, layer.output
            found += [
                Kernel("batch_norm statistics", (x,), ()),
                Kernel("batch_norm", (x,), (x,)),
                Kernel("relu", (x,), (x,)),
                Kernel("convolution", (x,), (y,), layer.products, layer.weights),
            ]
            if adds:
                found.append(Kernel("add", (y, y), (y,)))
        elif plan in ("A", "B"):
            found += library_forward(layer, adds=adds)
        else:
            found += own_forward(layer, adds, separate_add=plan == "C")
    return found


def unit_backward(plan: str, layers: Sequence[Layer]) -> list[Kernel]:
    """Of the same unit, every gradient wanted, kernels in the order in which they run."""
    found: list[Kernel] = []
    for index, layer in reversed(list(enumerate(layers))):
        x, y = layer.input, layer.output
        skip = index == 0
        if plan == "eager":
            found += [
                Kernel("convolution backward input", (y,), (x,), layer.products, layer.weights),
                Kernel("convolution backward weight", (y, x), (), layer.products, layer.weights),
                Kernel("relu backward", (x, x), (x,)),
                Kernel("batch_norm backward sums", (x, x), ()),
                Kernel("batch_norm backward", (x, x), (x,)),
            ]
            if skip:
                found.append(Kernel("add", (x, x), (x,)))
        elif plan in ("A", "B"):
            found += library_backward(layer, plan == "A", skip)
        else:
            last = index == len(layers) - 1
            deferred = plan == "E"
            found += own_backward(layer, skip, deferred and not last, deferred and not skip)
    return found


def saved_maps(plan: str, layers: Sequence[Layer]) -> int:
    """Elements of the maps that a unit keeps for its backward."""
    inputs = sum(layer.input for layer in layers)
    return inputs if plan in ("B", "C", "D", "E") else 2 * inputs


def predicted(kernels: Sequence[Kernel], gpu: Gpu, itemsize: int, tf32: bool = True) -> float:
    """Seconds, by the model."""
    return sum(kernel.seconds(gpu, itemsize, tf32) for kernel in kernels)


def nearest_gpu(capability: int) -> Gpu:
    """The listed device of a compute capability, else the newest one that is older."""
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability] or [GPUS["a100"]]
    return max(older, key=lambda gpu: (gpu.capability, gpu.bandwidth))
