"""Which backend runs a call on a device of ``backends.MEASURED``: the fastest one that is right.

Before a backend's first use on a device its ops must pass ``proof`` there, in every type the call
computes in. Then each problem (function, shapes, types, layouts, what needs a gradient) is run once
through every backend that passed and through eager PyTorch, forward and, where a gradient may be
asked for, backward, on operands of its own, and the fastest one is taken, eager included. A backend
whose results at these sizes are not eager's, or that raises, is left out. A call keeps its backend
from forward to backward.

Where nothing may be timed, the choice made before for the same problem holds. Without one

- ``PREACT_TUNE=off`` and deterministic algorithms follow the written default, the first backend
  of ``backends.PREFERENCE`` that passes its proof: whoever asks for these asks for a choice that is
  the same in every run, and a proof times nothing;
- a CUDA graph being captured, a fake tensor or any other dispatch mode takes eager PyTorch: there
  not even a proof can run, and nothing shows that a fused backend would be faster;
- ``torch.compile`` always takes eager PyTorch, even for problems measured before: the backends
  would have to beat what the compiler makes of eager's operations, and that was never timed.

Choices are kept in memory, and on disk as ``tuning`` keeps its own; proofs are not.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops, plans, proof, tuning
from .accuracy import distance
from .reference import memory_format_of

REFERENCE = "reference"
FARTHEST = 0.05
"""Relative distance from eager's results at a problem's own sizes, in the Euclidean norm: roundings
are the proof's concern, a tile that only large maps have is this one's."""
SIZES = 8
"""Measured of problems that differ by batch and image alone; others take the nearest's choice."""

_PLAIN = (bool, type(None), int, str)

_log = logging.getLogger("preact")
_lock = threading.RLock()
_thread = threading.local()


class Choice(NamedTuple):
    backend: str
    measured: bool
    reason: str


class Problem(NamedTuple):
    """What a choice depends on: plain values. Floats (eps, momentum) change nothing."""

    function: str
    shape: tuple[int, ...]
    arguments: tuple[object, ...]
    settings: tuple[object, ...]
    device: torch.device

    @property
    def family(self) -> Problem:
        return self._replace(shape=self.shape[1:2])


_known: dict[tuple[object, ...], str] = {}
"""What was measured, by everything of a call that could tell it from another."""
_decided: dict[Problem, Choice] = {}
_names: dict[Problem, str] = {}
_sizes: dict[Problem, list[tuple[int, str]]] = {}


def choose(call: partial[Any], dtypes: Sequence[torch.dtype]) -> str:
    """The backend for ``call``, a function of this package with the input as its first argument.

    ``dtypes`` are those it computes in. The function asks ``choose`` itself, and is told what to
    run while it is being timed.
    """
    if torch.compiler.is_compiling():
        return REFERENCE
    pinned: str | None = getattr(_thread, "backend", None)
    if pinned is not None:
        return pinned
    device = call.args[0].device
    settings = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        plans.current(),
        torch.backends.cudnn.benchmark,
        ops.allows_tf32(),
        torch.get_num_threads() if device.type == "cpu" else None,
    )
    key: list[object] = [call.func, device, settings]
    _flatten(call.args, key)
    _flatten(call.keywords.values(), key)
    exact = tuple(key)
    known = _known.get(exact)
    if known is not None:
        return known
    problem = _problem(call, settings)
    decided = _decided.get(problem)
    if decided is not None and decided.measured:
        _known[exact] = decided.backend
        return decided.backend
    with _lock:
        decided = _decide(problem, call, sorted(set(dtypes), key=str))
        if decided != _decided.get(problem):
            _log.info("%s: %s, %s", _names[problem], decided.backend, decided.reason)
        _decided[problem] = decided
    return decided.backend


def _flatten(values: Iterable[Any], key: list[object]) -> None:
    """The quick way to a choice that was made: every call takes it."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            key.append(value)
        elif kind is float:
            pass
        elif hasattr(value, "training"):  # a Norm, whose vectors go together
            weight = value.weight
            key += (value.training, None if weight is None else weight.requires_grad)
        elif isinstance(value, (tuple, list)):
            _flatten(value, key)
        else:
            if value.dim() > 1:
                key += (value.shape, value.stride(), value.dtype)
            key.append(value.requires_grad)


def _problem(call: partial[Any], settings: tuple[object, ...]) -> Problem:
    input: Tensor = call.args[0]
    described = (*map(_described, call.args), *map(_described, call.keywords.values()))
    return Problem(call.func.__name__, tuple(input.shape), described, settings, input.device)


def _described(value: Any, inside: bool = False) -> object:
    """A map's size follows from the input's and the weights'; of a vector nothing matters more than
    that it is there."""
    if isinstance(value, Tensor):
        if value.dim() < 2:
            return value.requires_grad
        shape = tuple(value.shape) if inside else None
        last = memory_format_of(value) == torch.channels_last
        return (shape, str(value.dtype), last, value.requires_grad)
    if isinstance(value, (tuple, list)):
        return tuple(_described(part, True) for part in value)
    return None if isinstance(value, float) else value


def _name(problem: Problem, call: partial[Any]) -> str:
    """For people, made unique by a digest of everything else that the choice depends on."""
    input: Tensor = call.args[0]
    weights = ["x".join(map(str, w.shape)) for w in _tensors(call.args, 4)]
    last = memory_format_of(input) == torch.channels_last
    compute = problem.settings[1] or input.dtype
    parts = [
        problem.function,
        "x".join(map(str, problem.shape)),
        *(["* " + ", ".join(weights)] if weights else []),
        str(compute)[6:],
        "channels_last" if last else "contiguous",
        "training" if problem.settings[0] else "without gradients",
    ]
    digest = hashlib.sha256(repr(problem[:-1]).encode()).hexdigest()[:8]
    return f"{' '.join(parts)} #{digest}"


def _tensors(values: Any, least_dim: int) -> Iterator[Tensor]:
    """Those within the tuples of ``values``, which holds maps beside them."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from (t for t in value if isinstance(t, Tensor) and t.dim() >= least_dim)
            yield from _tensors(value, least_dim)


def _why_unmeasured(problem: Problem) -> tuple[str, bool]:
    """Why nothing may be timed now, empty where it may; and whether a proof may run."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is active", False
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return "saved tensors must not be looked at", False
    reason = tuning.why_not(problem.device)
    return reason, not tuning.capturing(problem.device)


def _decide(problem: Problem, call: partial[Any], dtypes: Sequence[torch.dtype]) -> Choice:
    device = problem.device
    name = _names[problem] = _name(problem, call)
    unmeasured, provable = _why_unmeasured(problem)
    if not provable:
        return Choice(REFERENCE, False, f"{unmeasured}, and nothing was measured before")
    try:
        refused = {
            backend: proof.why_not(backend, device, dtypes)
            for backend in backends.fused(device.type)
        }
    except torch.OutOfMemoryError:
        return Choice(REFERENCE, True, "too little memory to prove a backend right")
    right = [backend for backend, wrong in refused.items() if not wrong]
    wrong = "".join(f"; {backend} is {reason}" for backend, reason in refused.items() if reason)
    if not right:
        return Choice(REFERENCE, not unmeasured, f"no fused backend is right here{wrong}")
    if unmeasured:
        return Choice(right[0], False, f"the written default, as {unmeasured}{wrong}")
    sizes = _sizes.setdefault(problem.family, [])
    size = torch.Size(problem.shape).numel()
    if len(sizes) >= SIZES:
        nearest = min(sizes, key=lambda known: abs(known[0] - size))
        return Choice(nearest[1], True, f"as the nearest of {SIZES} sizes that were measured")
    known = tuning.kept("backend", name, device)
    if known is not None and len(known) == 2 and known[0] in (REFERENCE, *right):
        found = Choice(str(known[0]), True, str(known[1]))
    else:
        try:
            found = _fastest([REFERENCE, *right], _Trial(call))
        except torch.OutOfMemoryError:
            return Choice(REFERENCE, True, "too little memory to measure")
        tuning.remember("backend", name, found[::2], device)
    sizes.append((size, found.backend))
    return found._replace(reason=found.reason + wrong)


def _fastest(names: Sequence[str], trial: _Trial) -> Choice:
    expected = trial.run(REFERENCE)
    left, refused = [REFERENCE], ""
    for name in names[1:]:
        try:
            wrong = _farther(trial.run(name), expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a kernel's launch or compilation raises
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            refused += f"; {name} is left out here, {wrong}"
            _log.warning("backend %s is left out: %s", name, wrong)
        else:
            left.append(name)
    del expected
    if len(left) == 1:
        return Choice(REFERENCE, True, f"nothing else is left{refused}")
    runs = [partial(trial.run, name) for name in left]
    with torch.cuda.device(trial.device) if trial.device.type == "cuda" else nullcontext():
        times = tuning.measure(runs, trial.device)
    fastest = left[times.index(min(times))]
    listed = ", ".join(f"{name} {ms:.3g} ms" for name, ms in zip(left, times, strict=True))
    return Choice(fastest, True, f"measured: {listed}{refused}")


def _farther(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> str:
    """Why results of a trial cannot be eager's, empty where they can; of parameters' gradients,
    which may cancel, only NaN and infinity are told."""
    for index, (result, eager) in enumerate(zip(found, expected, strict=True)):
        if result is None or eager is None:
            continue
        if not bool(result.isfinite().all()) and bool(eager.isfinite().all()):
            return f"result {index} is not finite"
        many = eager.dim() == 4 and eager.numel() >= 32 * eager.size(1)
        if index < 2 and many and (far := distance(result, eager)) > FARTHEST:
            return f"result {index} is {far:.2g} from eager's"
    return ""


class _Trial:
    """A call of the same function on operands that nothing else holds."""

    def __init__(self, call: partial[Any]) -> None:
        self.device: torch.device = call.args[0].device
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.twins: dict[int, Tensor] = {}
        options = {name: self.twin(value) for name, value in call.keywords.items()}
        self.call = partial(call.func, *map(self.twin, call.args), **options)
        self.leaves = [twin for twin in self.twins.values() if twin.requires_grad]
        self.grads: list[Tensor] = []

    def twin(self, value: Any, inside: bool = False) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.twins:
                scale = value[0].numel() ** -0.5 if inside and value.dim() == 4 else 1.0
                self.twins[id(value)] = self.random(value, scale)
            return self.twins[id(value)]
        if isinstance(value, (tuple, list)):
            parts = [self.twin(part, True) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def random(self, like: Tensor, scale: float = 1.0) -> Tensor:
        """Of the same shape, type and layout; vectors positive, as variances are."""
        values = torch.randn(like.shape, generator=self.generator, device=self.device) * scale
        if like.dim() < 2:
            values = values.abs() + 0.5
        twin = torch.empty_like(like, requires_grad=False).copy_(values)
        return twin.requires_grad_(like.requires_grad and torch.is_grad_enabled())

    def run(self, backend: str) -> list[Tensor | None]:
        """The output, the input's gradient or None, and those of all else that needs one."""
        with _pinned(backend), _alone(self.device):
            outputs = list(_tensors([[self.call()]], 2))
            output = outputs[0].detach()
            if not any(output.requires_grad for output in outputs):
                return [output]
            if not self.grads:
                self.grads = [self.random(output.detach()) for output in outputs]
            gradients = torch.autograd.grad(outputs, self.leaves, self.grads, allow_unused=True)
        known = dict(zip(self.leaves, gradients, strict=True))
        return [output, known.pop(self.call.args[0], None), *known.values()]


@contextmanager
def _pinned(backend: str) -> Iterator[None]:
    _thread.backend = backend
    try:
        yield
    finally:
        _thread.backend = None


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """What the caller has set up to see his own tensors sees none of the trial's."""
    cast: AbstractContextManager[object] = nullcontext()
    if torch.is_autocast_enabled(device.type):  # its cache would keep the trial's weights
        dtype = torch.get_autocast_dtype(device.type)
        cast = torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with hooks, cast:
        yield


def describe(device_type: str) -> list[str]:
    """What was proved and chosen on a device so far, a line each."""
    lines = [
        f"{backend} in {str(dtype)[6:]} on {device}: {wrong or 'right'}"
        for (backend, device, dtype), wrong in proof.results().items()
        if device.type == device_type
    ]
    return lines + [
        f"{_names[problem]}: {made.backend}, {made.reason}"
        for problem, made in _decided.items()
        if problem.device.type == device_type
    ]
