"""Records the kernels that a call launches, with arguments and grid, without a GPU.

The launchers run as they are, on tensors of the meta device, so that shapes may be those of real
networks and the specialisation on divisibility is that of the real call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from preact import tuning


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def bound(self) -> dict[str, Any]:
        """Arguments by the kernel's own names, the compiler's options left out."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.args, strict=False))
        return values | {k: v for k, v in self.kwargs.items() if k in names}

    def options(self) -> dict[str, Any]:
        """What the compiler is told: ``num_warps``, ``num_stages``, …"""
        return {k: v for k, v in self.kwargs.items() if k not in self.kernel.arg_names}


def record(call: Callable[[], object], every_configuration: bool = False) -> list[Launch]:
    """Launches of ``call``, in order; those of the default configuration, or of all shipped ones.

    Only where the kernels are compiled, so not with TRITON_INTERPRET=1.
    """
    found: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch(self, args, kwargs, ())
        found.append(launch._replace(grid=grid(launch.bound()) if callable(grid) else grid))

    def select(
        op: str, key: Any, configs: Any, launch: Callable[[Any], object], device: Any
    ) -> Any:
        for config in configs[1:]:
            launch(config)
        return configs[0]

    with mock.patch.object(JITFunction, "run", run):
        if every_configuration:
            with mock.patch.object(tuning, "select", select):
                call()
        else:
            call()
    return found


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    """A feature map without memory."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
