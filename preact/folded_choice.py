"""Whether a call runs with batch norms folded into the convolutions before them: what is faster.

The convolutions are the library's then, unfolded each runs with the BN-ReLU before it. Which is
faster depends on the shapes, so the first call of each tries both on its own operands, and folds
where that is clearly faster. Where nothing may be measured all norms stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import backends, checks, plans, trials, tuning
from .folded import forget, runs_in_one_dnn
from .reference import memory_format_of

CLEARLY, SECONDS = 0.95, 10.0
"""The share of the unfolded call's time to stay under; for measuring, a process."""

_MOST = 64
_log = logging.getLogger("preact")
_budget = trials.Budget(SECONDS)
_known: WeakKeyDictionary[nn.Conv2d, dict[tuple[object, ...], bool]] = WeakKeyDictionary()
"""By the first convolution of a call what was decided for inputs of a kind."""
_decided: dict[str, str] = {}
"""What was decided of each problem, in words."""


class Candidate(NamedTuple):
    """A call that may fold; both ways give the same result but for rounding."""

    convs: Sequence[nn.Conv2d]
    serves: Callable[[], bool]
    """Whether it can; raises for a wrong argument, unless ``unfolded`` does."""
    unfolded: Callable[[], Tensor]
    folded: Callable[[], Tensor]
    words: str
    """What it computes of its input."""


class _Way(NamedTuple):
    folds: bool


def folds(
    input: Tensor,
    convs: Sequence[nn.Conv2d],
    candidate: Callable[[], Candidate],
    *options: object,
) -> bool:
    """Whether this call folds its norms; to be asked where ``folded.applies``.

    ``convs`` are its convolutions in order, ``options`` what else tells it from other calls of
    them; ``candidate`` is asked for where nothing is known of such an input yet.
    """
    autocast = torch.is_autocast_enabled("cpu")
    kind = (
        input.shape, input.stride(), input.dtype, type(input), input.device,
        autocast and torch.get_autocast_dtype("cpu"), torch.get_num_threads(),
        backends.choose(input.device.type), plans.current(), tuning.why_not(input.device),
        torch._C._get_tracing_state() is None, torch._C._len_torch_dispatch_stack(),
        *map(_kind_of, convs), *options,
    )  # fmt: skip
    of_first = _known.setdefault(convs[0], {})
    known = of_first.get(kind)
    if known is None:
        known = _decide(input, candidate())
        if len(of_first) >= _MOST:
            of_first.clear()
        of_first[kind] = known
    return known


def _kind_of(conv: nn.Conv2d) -> tuple[object, ...]:
    padding = conv.padding if isinstance(conv.padding, str) else checks.pair(conv.padding)
    return (
        conv.weight.shape, conv.weight.dtype, checks.pair(conv.stride), padding,
        checks.pair(conv.dilation), conv.groups,
    )  # fmt: skip


def _decide(input: Tensor, candidate: Candidate) -> bool:
    """Whether to fold; raises what the call would."""
    if not (_is_plain(input, candidate.convs) and candidate.serves()):
        return False
    problem = _problem(input, candidate.words)
    if _budget.left() <= 0 and tuning.kept("fold", problem, input.device) is None:
        _decided.setdefault(problem, "not folded, no time left to measure")
        return False

    def run(way: _Way) -> object:
        return candidate.folded() if way.folds else candidate.unfolded()

    try:
        ways = (_Way(False), _Way(True))
        chosen = trials.select_on_cpu("fold", problem, ways, run, CLEARLY, _budget).folds
    finally:
        forget(candidate.convs)  # nobody may need their weights
    measured = tuning.is_known("fold", problem, input.device)
    how = "measured" if measured else f"not measured: {tuning.why_not(input.device)}"
    _decided[problem] = f"{'folded' if chosen else 'not folded'}, {how}"
    _log.info("%s: %s", problem, _decided[problem])
    return chosen


def _is_plain(input: Tensor, convs: Sequence[nn.Conv2d]) -> bool:
    """Whether convolutions of oneDNN's may run, and be timed, for this input."""
    return not (
        type(input) is not Tensor
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or not runs_in_one_dnn(input)
        or any(isinstance(conv.padding, str) for conv in convs)
        or any(torch.nn.utils.parametrize.is_parametrized(conv) for conv in convs)
        or any(checks.compute_type(conv.weight) != input.dtype for conv in convs)
    )


def _problem(input: Tensor, words: str) -> str:
    """A call in words, with all that the time of either way depends on."""
    last = memory_format_of(input) == torch.channels_last
    layout = "channels_last" if last else "contiguous"
    run_by = f"{torch.get_num_threads()} threads {backends.choose('cpu')} {plans.current()}"
    return f"{_by(input.shape)} {str(input.dtype)[6:]} {layout} {words} {run_by}"


def in_words(conv: nn.Conv2d) -> str:
    groups = "" if conv.groups == 1 else f" groups {conv.groups}"
    stride = "" if max(checks.pair(conv.stride)) == 1 else f" stride {conv.stride}"
    dilation = "" if max(checks.pair(conv.dilation)) == 1 else f" dilation {conv.dilation}"
    bias = "" if conv.bias is None else " bias"
    return f"{_by(conv.weight.shape)}{stride}{dilation}{groups}{bias}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def describe() -> list[str]:
    """A line for each problem decided in this process."""
    return [f"{problem}: {decided}" for problem, decided in _decided.items()]
