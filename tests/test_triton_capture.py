"""What a launcher does besides launching, where a CUDA graph captures it: it allocates, no more."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from preact.backends import triton as backend

from .evidence import calls, interpreter
from .evidence.launches import record

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE, reason="TRITON_INTERPRET=1 runs what would be launched"
)

ALLOCATING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
"""Through PyTorch's allocator, which keeps a graph's memory for it."""
VIEWING = {"view", "permute", "select", "slice", "alias", "detach", "as_strided", "t", "transpose"}


class Ops(TorchDispatchMode):
    """Every op that runs, by name. A value read on the host would be one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [*calls.WIDE, calls.NARROWER[0], calls.STRIDED], ids=str)
def test_a_convolution_launches_and_allocates(case: calls.Convolution) -> None:
    for op, call in calls.convolution(case, torch.bfloat16).items():
        with Ops() as ops:
            launched = record(call)
        assert launched, op
        assert not ops.names - ALLOCATING - VIEWING, op


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_pass_launches_and_allocates(channels_last: bool) -> None:
    for op, call in calls.streaming(calls.SHAPE, torch.bfloat16, channels_last).items():
        with Ops() as ops:
            launched = record(call)
        assert launched, op
        assert not ops.names - ALLOCATING - VIEWING, op


def test_what_reads_a_value_is_noticed() -> None:
    with Ops() as ops, pytest.raises(RuntimeError):
        torch.empty(1, device="meta").sum().item()
    assert ops.names - ALLOCATING - VIEWING == {"sum", "_local_scalar_dense"}


def test_a_launch_is_on_the_device_of_its_map() -> None:
    """Triton launches on the current device, whichever that is."""
    x = torch.empty(1, 4, 2, 2)
    order = mock.MagicMock()
    order.launcher.return_value = None
    order.device_of.return_value.__enter__ = order.enter
    order.device_of.return_value.__exit__ = order.leave
    with (
        mock.patch.object(torch.cuda, "device_of", order.device_of),
        mock.patch.object(backend, "_launcher", return_value=order.launcher),
    ):
        backend._implementation("batch_norm_stats")(x)
    assert [name for name, *_ in order.mock_calls] == ["device_of", "enter", "launcher", "leave"]
    assert order.device_of.call_args.args[0] is x
