"""Which convolutions run fused with their prefix, and which as the library's between our passes.

The plans A to E are those of ``costs``. Without a forced one each convolution is decided by itself,
forward and backward: on a GPU by what is faster there, measured on the device at the first call of
a shape class, as ``cudnn.benchmark`` does, and kept as the configurations of ``tuning`` are. Where
measuring is off (``PREACT_TUNE=off``, deterministic algorithms, a CUDA graph being captured) the
model of ``costs`` decides. On a CPU written limits do, but for convolutions near them of enough
work to matter: those are measured too, once, and depart from the limit for a clear gain alone, so
that a run rounds as the one before it. Nothing is measured while compiling or tracing.

``use_plan`` and ``PREACT_PLAN`` force one plan on every convolution that its kernels can serve:
A keeps the activation for backward, B computes it again, C to E fuse the convolution.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backends, costs, ops, trials, tuning
from .backends import cpp, triton
from .reference import memory_format_of

Geometry = cpp.Geometry
NAMES = ("auto", *costs.PLANS)
_OWN = ("C", "D", "E")
# On a CPU: how far from its written limit a convolution is measured, as a factor of its weights,
# the share of the written choice's time that another must stay under, and the multiplications
# (about half a millisecond's) from which on a wrong choice is worth finding.
NEAR, CLEARLY, ENOUGH = 4, 0.9, 100_000_000
SMALL_MAP = 250_000
"""Elements of a map on a CPU up to which passes around the library's convolutions gain less than
their way through Python takes."""

_log = logging.getLogger("preact")
forced: str | None = None
"""By ``use_plan``."""
_decided: dict[trials.Problem, tuple[bool, str]] = {}
"""Whether our convolution runs, and by what that was decided."""


def _checked(name: str, what: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{what} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_plan(name: str) -> Iterator[None]:
    """Run every unit inside the block by one plan: "A" to "E", or "auto".

    The setting is the process's, not the thread's, and holds for backward passes that run inside
    the block. An unknown name raises ``ValueError``.
    """
    global forced
    before = forced
    forced = _checked(name, "plan")
    try:
        yield
    finally:
        forced = before


@cpp.constant_to_compile
def _current(forced: str | None) -> str:
    return forced or _checked(os.environ.get("PREACT_PLAN", "").strip() or "auto", "PREACT_PLAN")


def current() -> str:
    """The plan asked for, or "auto"."""
    return _current(forced)


def keeps_activation(asked: bool) -> bool:
    """Whether an activation that is written is kept for backward; ``asked`` by the caller."""
    plan = current()
    return asked if plan == "auto" else plan == "A"


def adds_in_epilogue() -> bool:
    """Whether a fused convolution takes the addition as well."""
    return current() != "C"


def fuses_convolution(
    backend: str,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    work: str,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``weight`` convolves the BN-ReLU of ``input`` in a kernel of our own.

    ``work`` is "forward", "forward with residual", "forward with statistics" of the result (and a
    residual or none), or "backward"; each is chosen by itself, as none needs what another leaves.
    "dense block" asks for all of it: such a block takes no convolution of the library's. ``dtype``
    is the type that ``weight`` is yet to be cast to.
    """
    dtype = weight.dtype if dtype is None else dtype
    prefix = (input, weight, geometry, work)
    if backend == "cpp":
        if current() in ("A", "B"):
            return False
        if input.device.type == "cuda":
            return cpp.serves_pointwise(input, weight, geometry, dtype)
        if input.device.type != "cpu" or not cpp.serves_direct(*prefix, dtype):
            return False
        most = cpp.most_weights(*prefix)
        return _decide_on_cpu(*prefix, most) if _measures_cpu(work) else weight.numel() <= most
    if input.dtype not in triton.DTYPES or dtype != input.dtype:
        return False
    plan = current()
    return plan in _OWN if plan != "auto" else _decide(*_problem(*prefix))


def small_map() -> int:
    """``SMALL_MAP``, or what PREACT_SMALL_MAP has instead."""
    asked = os.environ.get("PREACT_SMALL_MAP", "").strip()
    if asked and not asked.isdecimal():
        raise ValueError(f"PREACT_SMALL_MAP must be a number of elements, got {asked!r}")
    return int(asked or SMALL_MAP)


def is_too_small(backend: str, input: Tensor, elements: int) -> bool:
    """Whether a prefix or unit is faster as eager PyTorch: none of its convolutions is ours in
    forward, and its maps have ``elements`` at most. By a written limit, where neither backend nor
    plan is asked for."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and backend == "cpp"
        and input.device.type == "cpu"
        and elements <= small_map()
        and backends.is_automatic()
        and current() == "auto"
    )


def leaves_pending(backend: str, input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the norm behind a convolution leaves its gradient to the convolution's backward.

    ``input`` and ``weight`` are the convolution's, whose backward is fused.
    """
    plan = current()
    if plan != "auto" or backend == "cpp":
        return plan not in ("C", "D")
    return _decide(*_problem(input, weight, geometry, "pending"))


def _measures_cpu(work: str) -> bool:
    return (
        work != "dense block"
        and current() == "auto"
        and not torch.compiler.is_compiling()
        and tuning.setting() != "off"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _decide_on_cpu(input: Tensor, weight: Tensor, geometry: Geometry, work: str, most: int) -> bool:
    """The written limit's answer, or near the limit what is clearly the faster one here."""
    written = weight.numel() <= most
    if not most / NEAR < weight.numel() < most * NEAR:
        return written
    if tuning.setting() == "auto" and cpp.multiplications(input, weight, geometry[0]) < ENOUGH:
        return written
    problem = trials.of_sizes_on_cpu(_problem(input, weight, geometry, work))
    known = _decided.get(problem)
    # Asked again at every call, what was not measured would cost more than it can gain.
    if known is not None and (known[1] == "measured" or trials.PLANS.left() <= 0):
        return known[0]
    if tuning.why_not(input.device):  # for now: the next call may measure
        return written
    own, measured = trials.fastest(problem, written, "cpp", CLEARLY)
    _decided[problem] = (own, "measured" if measured else "by its limit, no time left to measure")
    _log.info("%s: %s", problem, describe_choice(problem))
    return own


def _problem(input: Tensor, weight: Tensor, geometry: Geometry, work: str) -> trials.Problem:
    if work == "forward with residual":  # no trial adds one
        work = "forward"
    return trials.Problem(
        work, tuple(input.shape), tuple(weight.shape), *geometry, str(input.dtype)[6:],
        memory_format_of(input) == torch.channels_last, input.device.type, input.device.index,
    )  # fmt: skip


# Arguments are plain numbers, so that torch.compile decides as an uncompiled call does.
@cpp.constant_to_compile
def _decide(*parts: object) -> bool:
    problem = trials.Problem(*parts)  # type: ignore[arg-type]
    known = _decided.get(problem)
    if known is not None:
        return known[0]
    preferred = _by_model(problem)
    own, measured = trials.fastest(problem, preferred)
    # A choice without measuring is forgotten on a GPU, where the next call may measure.
    if measured or problem.device_type != "cuda":
        _decided[problem] = (own, "measured" if measured else "by the cost model")
        _log.info("%s: %s", problem, describe_choice(problem))
    return own


@functools.lru_cache(maxsize=4096)
def _by_model(problem: trials.Problem) -> bool:
    """Whether our convolution is the faster one, or for "pending" whether leaving it is."""
    gpu = costs.nearest_gpu(trials.capability(problem))
    layer = costs.layer(
        problem.input_shape, problem.weight_shape, problem.stride, problem.padding, problem.dilation
    )
    if problem.work == "pending":
        own = costs.own_backward(layer, pending=True)
        # What is saved is a pass over the result: reads dz and x, writes dx.
        other = [*costs.own_backward(layer), costs.apply(layer.output)]
    elif problem.work == "backward":
        own, other = costs.own_backward(layer), costs.library_backward(layer)
    else:
        own = costs.own_forward(layer)
        other = costs.library_forward(layer, statistics=problem.work != "forward")
    itemsize = 4 if problem.dtype == "float32" else 2
    tf32 = ops.allows_tf32()
    return costs.predicted(own, gpu, itemsize, tf32) <= costs.predicted(other, gpu, itemsize, tf32)


def describe_choice(problem: trials.Problem) -> str:
    own, how = _decided[problem]
    if problem.work == "pending":
        return f"{'E' if own else 'D'}, {how}"
    return f"{'our convolution' if own else 'the library'}, {how}"


def describe(device_type: str) -> str:
    """The plan on a device, and every choice made there so far, a line each."""
    plan = current()
    if plan != "auto":
        return f"{plan}, forced"
    setting = tuning.setting()
    if device_type == "cpu":
        how = "as PREACT_TUNE=off" if setting == "off" else "measured near them"
        first = (
            f"auto: by written limits on a CPU, {how}; eager PyTorch for maps of up to"
            f" {small_map()} elements between the library's convolutions"
        )
    elif setting == "off":
        first = "auto: by the cost model, as PREACT_TUNE=off"
    else:
        first = "auto: measured at the first call of each shape"
    made = [problem for problem in _decided if problem.device_type == device_type]
    return "\n".join([first, *(f"  {problem}: {describe_choice(problem)}" for problem in made)])
