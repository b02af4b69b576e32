"""Whether a backend is right on a device: every op the units use, on small operands of its own.

Judged by the rule of ``accuracy`` against the formulas of ``reference`` in float64, with the same
formulas in the type itself as the eager side. What a process finds it keeps, not the disk: a proof
is of this build, this driver and this device. Nothing is timed, no tile is tuned, and neither the
random state nor any tensor but the operands made here is touched.

A kernel that raises or is wrong is found here; one that makes the device itself fail (an illegal
address) ends a CUDA process, whoever calls it first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops, reference, tuning
from .accuracy import mismatch

EPS = 1e-5
TF32 = 2.0**-10
# Odd on purpose: no tile is full, and some channels are left over from every vector.
STREAMED = ((3, 17, 5, 7), (2, 40, 9, 6))
LAYOUTS = (torch.contiguous_format, torch.channels_last)

_log = logging.getLogger("preact")
_found: dict[tuple[str, torch.device, torch.dtype], str] = {}


class Convolution(NamedTuple):
    input: tuple[int, int, int, int]
    outs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


CONVOLUTIONS = (
    Convolution((2, 20, 7, 6), 17, (3, 3), padding=(1, 1)),
    Convolution((3, 40, 5, 5), 24, (1, 1)),
    Convolution((2, 24, 9, 6), 16, (3, 3), (2, 2), (1, 1)),
    Convolution((2, 16, 6, 9), 24, (1, 1), (2, 2)),
    Convolution((2, 12, 5, 5), 6, (3, 3), padding=(1, 1), groups=3),
    # Full tiles, for which kernels leave out what looks after the rest.
    Convolution((1, 64, 8, 8), 64, (3, 3), padding=(1, 1)),
)


class WrongResultError(Exception):
    """An op's result is not eager's, to rounding."""


def why_not(backend: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Empty where a backend's ops give eager's results in each of ``dtypes``, else what failed.

    Runs them at the first question about a type. Raises ``torch.OutOfMemoryError``, which says
    nothing of the backend.
    """
    for dtype in dtypes:
        key = (backend, device, dtype)
        if key not in _found:
            _found[key] = _prove(*key)
            if _found[key]:
                _log.warning("backend %s is left out on %s: %s", backend, device, _found[key])
        if _found[key]:
            return _found[key]
    return ""


def is_proved(backend: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether ``why_not`` has found the backend right; asks nothing of the device."""
    return all(_found.get((backend, device, dtype)) == "" for dtype in dtypes)


def results() -> dict[tuple[str, torch.device, torch.dtype], str]:
    """What was found so far, by backend, device and type; empty where all was right."""
    return dict(_found)


def _prove(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    table = backends.table(backend)
    name = str(dtype)[6:]
    try:
        with torch.no_grad(), tuning.paused():
            for layout in LAYOUTS:
                for allowed in (False, True) if _has_tf32(device, dtype) else (False,):
                    with _tf32(allowed, device):
                        _Proof(table, device, dtype, layout, TF32 if allowed else None).run()
    except WrongResultError as wrong:
        return f"wrong in {name}: {wrong}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel's launch or compilation raises
        return f"fails in {name}: {type(error).__name__}: {_first_line(error)}"
    return ""


def _has_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.float32 and ops.allows_tf32()


@contextmanager
def _tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Convolutions with or without TF32; what they may do outside is as before."""
    cudnn: Any = torch.backends.cudnn  # whose annotations lack conv
    before = cudnn.conv.fp32_precision
    if device.type == "cuda":
        cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if device.type == "cuda":
            cudnn.conv.fp32_precision = before


class _Proof:
    def __init__(
        self,
        table: Any,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
        eps: float | None,
    ) -> None:
        self.table, self.device, self.dtype, self.layout = table, device, dtype, layout
        self.eps = eps
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> None:
        for shape in STREAMED:
            self.streaming(shape)
        for convolution in CONVOLUTIONS:
            for optional in (False, True):
                self.convolution(convolution, optional)

    def make(self, *shape: int) -> Tensor:
        """The same numbers on every device; a vector in the accumulation type."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if len(shape) == 1:
            return values.to(self.device, reference.accumulate_dtype(self.dtype))
        return values.to(self.device, self.dtype).contiguous(memory_format=self.layout)

    def norm(self, shape: Sequence[int], affine: bool) -> tuple[Tensor, tuple[Any, ...]]:
        """An input and (mean, var, weight, bias); no value is within a rounding of the ReLU's zero,
        and ReLU(bias) would show in the padding."""
        x = self.make(*shape) * 2 + 1
        channels = shape[1]
        vectors: tuple[Any, ...] = (
            *reference.batch_norm_stats(x),
            self.make(channels).abs() + 0.5 if affine else None,
            self.make(channels).abs() + 0.1 if affine else None,
        )
        z = _normalised(x.double(), *_double(vectors))
        x = torch.where(z.abs() < 0.02, x + 0.5, x)
        return x.contiguous(memory_format=self.layout), vectors

    def call(self, name: str, *arguments: Any) -> tuple[Tensor, ...]:
        # What the allocator hands out next is NaN: an unwritten result shows.
        for like in [a for a in arguments if isinstance(a, Tensor)][:4]:
            torch.full_like(like, float("nan"))
        return _several(getattr(self.table, name)(*arguments))

    def judge(
        self,
        name: str,
        found: Sequence[Tensor],
        eager: Sequence[Tensor],
        exact: Sequence[Tensor],
        terms: float = 0.0,
    ) -> None:
        if len(found) != len(eager):
            raise WrongResultError(f"{name}: {len(found)} results, eager has {len(eager)}")
        for index, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
            wrong = mismatch(f"{name}, result {index}", a, b, c, terms, self.eps)
            if wrong:
                raise WrongResultError(wrong)

    def same(self, name: str, arguments: Sequence[Any], results: int | None = None) -> Any:
        """Judges the first ``results`` of an op by its formula; returns all of them."""
        found = self.call(name, *arguments)
        formula = getattr(reference, name)
        eager, exact = _several(formula(*arguments)), _several(formula(*_double(arguments)))
        self.judge(name, found[:results], eager[:results], exact[:results])
        if len(found) != len(eager):
            raise WrongResultError(f"{name}: {len(found)} results, eager has {len(eager)}")
        return found

    def statistics_of(self, name: str, map: Tensor, found: Sequence[Tensor]) -> None:
        """They are of a result as rounded: judged by that, not by eager's result."""
        eager = reference.batch_norm_stats(map)
        self.judge(f"{name}, statistics", found, eager, reference.batch_norm_stats(map.double()))

    def sums_of(self, name: str, gradient: Tensor, norm: Sequence[Any], found: Any) -> None:
        formula = reference.batch_norm_relu_backward_reduce
        exact = formula(gradient.double(), *_double(norm))
        # Terms may cancel: a sum's error is judged by their magnitude.
        terms = float(formula(gradient.double().abs(), *_double(norm))[1].max())
        self.judge(f"{name}, sums", found, formula(gradient, *norm), exact, terms)

    def streaming(self, shape: Sequence[int]) -> None:
        for affine in (True, False):
            x, vectors = self.norm(shape, affine)
            grad, skip = self.make(*shape), self.make(*shape)
            norm = (x, *vectors, EPS)
            self.statistics_of("batch_norm_stats", x, self.call("batch_norm_stats", x))
            (output,) = self.same("batch_norm_relu", norm)
            total, *statistics = self.same("identity_add", (x, skip), 1)
            self.statistics_of("identity_add", total, statistics)
            name = "batch_norm_relu_backward_reduce"
            sums = self.call(name, grad, *norm)
            self.sums_of(name, grad, norm, sums)
            name = "batch_norm_relu_backward_apply"
            for given in (sums, (None, None)):
                for added in (skip, None):
                    self.same(name, (grad, x, *vectors, *given, added, EPS))
                self.same("batch_norm_backward_coefficients", (x, *vectors[:3], *given, EPS))
            passed = self.call(name, torch.ones_like(x), x, *vectors, None, None, None, EPS)
            if not torch.equal(passed[0] != 0, output > 0):
                raise WrongResultError(f"{name}: its mask is not the forward's")

    def convolution(self, given: Convolution, optional: bool) -> None:
        """With everything that is optional, or with nothing of it."""
        x, vectors = self.norm(given.input, optional)
        geometry: tuple[Any, ...] = (given.stride, given.padding, given.dilation, given.groups)
        weight = self.make(given.outs, given.input[1] // given.groups, *given.kernel)
        shape = reference.convolve(x, weight, None, *geometry).shape
        grad, following = self.make(*shape), self.make(*shape)
        bias, residual, others = None, None, None
        pending: tuple[Tensor, ...] = ()
        if optional:
            bias = self.make(given.outs).to(self.dtype)
            residual, others = self.make(*shape), self.make(*given.input)
            pending = (following, torch.stack([self.make(given.outs) for _ in range(4)]))
        prefix = (x, *vectors, EPS, weight)
        name = "batch_norm_relu_conv2d"
        output, *statistics = self.same(name, (*prefix, bias, residual, *geometry), 1)
        self.statistics_of(name, output, statistics)

        name = "batch_norm_relu_conv2d_backward"
        arguments = (grad, *prefix, others, *geometry, *pending)
        found = self.call(name, *arguments)
        formula = reference.batch_norm_relu_conv2d_backward
        eager, exact = formula(*arguments), formula(*_double(arguments))
        of_maps = [(each[0], each[3]) for each in (found, eager, exact)]
        self.judge(name, of_maps[0], of_maps[1], of_maps[2])
        activation = reference.batch_norm_relu(*prefix[:6])
        if found[0][activation == 0].any():
            raise WrongResultError(f"{name}: its mask is not the forward's")
        self.sums_of(name, found[0], prefix[:6], found[1:3])


def _several(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _double(values: Any) -> Any:
    return [v.double() if isinstance(v, Tensor) else v for v in values]


def _normalised(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=EPS)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
