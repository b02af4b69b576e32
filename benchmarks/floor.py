"""The conv floor: a network's own convolutions with everything between them left out.

The convolutions that eager PyTorch really runs in a step, forward and backward, are recorded with
their sizes, strides, types and the gradients asked of them, and replayed on random tensors.
They run in the recorded order. Calls of one kind share their operands, so these are as warm in
cache as in a network that writes nothing in between, and results are dropped at once: to be faster
than this a network needs better convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ConvCall", "TensorSpec", "record", "replay"]

_CONVOLUTION = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class TensorSpec:
    """Everything about a tensor but its values."""

    role: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, role: int) -> TensorSpec:
        # An expanded gradient is made dense: a library convolution would copy it first anyway.
        dense = tensor if 0 not in tensor.stride() else tensor.contiguous()
        return cls(role, tuple(dense.shape), dense.stride(), dense.dtype, dense.device)

    def random(self) -> Tensor:
        return torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device
        ).normal_()


@dataclass(frozen=True)
class ConvCall:
    """One recorded call; tensors among the arguments are replaced by their ``TensorSpec``."""

    backward: bool
    arguments: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    calls: list[ConvCall]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _CONVOLUTION or func is _BACKWARD:
            described = tuple(
                TensorSpec.of(a, role) if isinstance(a, Tensor) else _frozen(a)
                for role, a in enumerate(args)
            )
            self.calls.append(ConvCall(func is _BACKWARD, described))
        else:
            # In inference mode composite ops, conv2d among them, arrive here whole.
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


def _frozen(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


def record(step: Callable[[], object]) -> list[ConvCall]:
    """Run ``step`` once and return its convolutions, forward and backward, in order."""
    recorder = _Recorder()  # type: ignore[no-untyped-call]
    recorder.calls = []
    with recorder:
        step()
    return recorder.calls


def replay(calls: list[ConvCall]) -> Callable[[], None]:
    """A step that runs the recorded convolutions and nothing else."""
    pool: dict[TensorSpec, Tensor] = {}

    def operand(argument: Any) -> Any:
        if not isinstance(argument, TensorSpec):
            return argument
        if argument not in pool:
            pool[argument] = argument.random()
        return pool[argument]

    prepared = [
        (_BACKWARD if call.backward else _CONVOLUTION, [operand(a) for a in call.arguments])
        for call in calls
    ]

    def step() -> None:
        with torch.no_grad():
            for function, arguments in prepared:
                function(*arguments)

    return step
