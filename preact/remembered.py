"""Calls that were checked before: what was decided for one holds for every other of its key.

Between kernels of a millisecond the checks and choices of a call count, and for all calls that
differ in nothing but their tensors' values they come out the same. A key holds what they depend on;
whoever runs such a call asks ``known`` first, and ``remember``s what was decided for a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, plans, tuning, variables
from .arguments import Conv, Norm

Key = tuple[object, ...]
Choice = TypeVar("Choice")

_MOST = 4096
_calls: dict[Key, Any] = {}


def carries_tangents() -> bool:
    """Whether forward-mode differentiation is on, which only an autograd Function refuses."""
    return forward_ad._current_level >= 0


def asked() -> object:
    """What choices depend on that is no argument's, and that a program may change at any time."""
    return (
        backends.forced, plans.forced, variables.state(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


class Kept(Generic[Choice]):
    """What is decided in the first backward of a call, for the backwards of all calls like it.

    It may run while another plan is forced than in forward, say; each has a choice of its own.
    """

    def __init__(self) -> None:
        self._choices: dict[object, Choice] = {}

    def get(self, decide: Callable[[], Choice]) -> Choice:
        if torch.compiler.is_compiling():
            return decide()
        now = asked()
        choice = self._choices.get(now)
        if choice is None:
            choice = decide()
            if not tuning.is_paused() and torch._C._len_torch_dispatch_stack() == 0:
                self._choices[now] = choice
        return choice


def key_of(
    input: Tensor,
    norms: Sequence[Norm],
    convs: Sequence[Conv],
    tensors: Sequence[Tensor | None] = (),
    *options: object,
) -> Key | None:
    """Everything but values that a call on a CPU depends on; None where it is not to be remembered.

    The backend is not among it but what it is chosen by, where that needs no measurement.
    ``tensors`` are those that come in neither a norm nor a convolution, ``options`` what else tells
    one call from another, first the function's name.
    """
    if (
        torch.compiler.is_compiling()
        or type(input) is not Tensor
        or not input.is_cpu
        or input.layout is not torch.strided
        or "cpu" not in backends.AUTOMATIC
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or carries_tangents()
    ):
        return None
    autocast = torch.is_autocast_enabled("cpu")
    parts: list[object] = [
        *options, input.shape, input.stride(), input.dtype, input.requires_grad,
        torch.is_grad_enabled(), autocast and torch.get_autocast_dtype("cpu"), asked(),
    ]  # fmt: skip
    for running_mean, running_var, weight, bias, training, momentum, eps in norms:
        parts += (training, momentum is None, eps)
        for tensor in (running_mean, running_var, weight, bias):
            if tensor is None:
                parts.append(None)
            else:
                parts += (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.is_cpu)
    for weight, bias, stride, padding, dilation, groups in convs:
        parts += (
            stride, padding, dilation, groups,
            weight.shape, weight.dtype, weight.requires_grad, weight.is_cpu, weight.stride(),
        )  # fmt: skip
        if bias is None:
            parts.append(None)
        else:
            parts += (bias.shape, bias.dtype, bias.requires_grad, bias.is_cpu)
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        else:
            parts += (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.is_cpu)
    return tuple(parts)


def known(key: Key | None) -> Any:
    """What was decided for this call, None for one that was never checked.

    Raises ``ValueError`` for a variable that no check of such a call may come across.
    """
    if key is None:
        return None
    try:
        found = _calls.get(key)
    except TypeError:  # a stride given as a list
        found = None
    if found is None:
        plans.current()
        plans.small_map()
        tuning.setting()
    return found


def remember(key: Key | None, settings: object) -> None:
    """Keep ``settings`` for the calls of ``key``, unless measuring is paused: one after that shall
    decide for itself."""
    if key is None or tuning.is_paused():
        return
    if len(_calls) >= _MOST:
        _calls.clear()
    with suppress(TypeError):
        _calls[key] = settings


def forget() -> None:
    """As in a new process, where choices are to be made again."""
    _calls.clear()
