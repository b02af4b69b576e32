"""Cases of the streaming kernels: tensors in every layout and alignment, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preact import reference

from ..tolerances import assert_as_good_as_eager, magnitude

OPS = (
    "batch_norm_stats",
    "batch_norm_relu",
    "identity_add",
    "batch_norm_relu_backward_reduce",
    "batch_norm_relu_backward_apply",
)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Channels that are, are not, and are less than whole vectors; planes likewise; single values.
SHAPES = [
    (3, 8, 4, 4),
    (2, 3, 5, 7),
    (1, 17, 4, 9),
    (6, 1, 3, 3),
    (5, 33, 1, 1),
    (1, 9, 1, 1),
    (1, 264, 2, 1),
    (40, 2, 1, 3),
    (2, 16, 7, 7),
]
# Elements beyond a 16-byte boundary of one map and of another.
OFFSETS = [(0, 0), (1, 1), (1, 0), (0, 3)]
EPS = 1e-5


@dataclass
class Sample:
    """One case: what the program gets, the op's own arguments, and the names of its results."""

    op: str
    folder: dict[str, Any]
    arguments: tuple[Any, ...]
    results: tuple[str, ...]
    shape: tuple[int, ...]
    channels_last: bool
    terms: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def expected(self, convert: Callable[[Tensor], Tensor] = lambda t: t) -> tuple[Tensor, ...]:
        """The formula of ``reference`` on converted arguments."""
        values = [convert(a) if isinstance(a, Tensor) else a for a in self.arguments]
        result = getattr(reference, self.op)(*values)
        return result if isinstance(result, tuple) else (result,)

    def arrange(self, flat: Tensor) -> Tensor:
        """A result as the kernel left it in memory, in its shape."""
        if flat.numel() == self.shape[1] and flat.numel() != torch.Size(self.shape).numel():
            return flat
        if not self.channels_last:
            return flat.view(self.shape)
        n, c, h, w = self.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    def check(self, results: tuple[Tensor, ...]) -> None:
        eager, exact = self.expected(), self.expected(lambda tensor: tensor.double())
        for name, result, own, truth in zip(self.results, results, eager, exact, strict=True):
            flat = result if own.dim() == 1 else self.arrange(result)
            assert_as_good_as_eager(f"{self.op} {name}", flat, own, truth, self.terms)


def many_chunks(dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Shapes whose reductions have several chunks: rows of channels, and one channel's planes.

    The first has more chunks than threads to join them, the last a chunk that begins behind a
    plane's end.
    """
    vector = 16 // dtype.itemsize
    return [
        (1, 1, 260, 261),
        (3, 5, 31, 31),
        (2, 1, 23, 90 * vector + 1),
        (2049, 1, 1, max(vector - 1, 3)),
    ]


def sample(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    offsets: tuple[int, int] = (0, 0),
    affine: bool = True,
    optional: bool = True,
    seeds: int = 4,
    x: Tensor | None = None,
) -> Sample:
    """``optional``: with the skip gradient and the sums, where the op takes them."""
    channels, spatial = shape[1], shape[2] * shape[3]
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def randn() -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=layout)

    x = randn() * 2 + 1 if x is None else x.contiguous(memory_format=layout)
    mean, var = reference.batch_norm_stats(x)
    vector = reference.accumulate_dtype(dtype)
    weight, bias = (torch.randn(channels, dtype=vector) if affine else None for _ in range(2))
    norm = {"mean": mean, "var": var, "weight": weight, "bias": bias}
    folder: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": shape[0],
        "channels": channels,
        "spatial": spatial,
        "channels_last": int(channels_last or spatial == 1),
        "offset": offsets[0],
        "other_offset": offsets[1],
        "seeds": seeds,
        "eps": EPS,
        "input": x,
    }
    vectors = (mean, var, weight, bias)
    terms = 0.0
    if op == "batch_norm_stats":
        arguments: tuple[Any, ...] = (x,)
        results: tuple[str, ...] = ("mean", "var")
        terms = magnitude(x)
    elif op == "identity_add":
        folder["other"] = other = randn()
        arguments, results = (x, other), ("output", "mean", "var")
        terms = magnitude(x)
    elif op == "batch_norm_relu":
        folder |= norm
        arguments, results = (x, *vectors, EPS), ("output",)
    else:
        folder |= norm | {"grad_output": (grad := randn())}
        terms = magnitude(grad)
        if op == "batch_norm_relu_backward_reduce":
            arguments, results = (grad, x, *vectors, EPS), ("grad_weight", "grad_bias")
            terms *= x.numel() / channels
        else:
            sums = tuple(torch.randn(channels, dtype=vector) if optional else None for _ in "ab")
            skip = randn() if optional else None
            folder |= {"grad_weight": sums[0], "grad_bias": sums[1], "grad_skip": skip}
            arguments, results = (grad, x, *vectors, *sums, skip, EPS), ("grad_input",)
    last = channels_last and spatial > 1
    return Sample(op, folder, arguments, results, shape, last, terms)


def samples(op: str, dtype: torch.dtype, seeds: int = 4) -> Iterator[Sample]:
    """Every shape in both layouts, with alignment and optional arguments taking turns."""
    turn = 0
    for channels_last in (False, True):
        for shape in [*SHAPES, *many_chunks(dtype)]:
            offsets = OFFSETS[turn % len(OFFSETS)]
            yield sample(
                op, shape, dtype, channels_last, offsets, turn % 3 != 1, turn % 2 == 0, seeds
            )
            turn += 1
        # Whole vectors in every alignment.
        for offsets in OFFSETS:
            yield sample(op, (2, 16, 4, 4), dtype, channels_last, offsets, seeds=seeds)
