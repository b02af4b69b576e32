"""What ``PREACT_BACKEND=cpp`` runs on CUDA, on fake tensors: no GPU is needed to see the choice."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import preact
from preact import plans
from preact.backends import cpp

POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def usable(monkeypatch):
    monkeypatch.setattr(cpp, "why_not", lambda device_type: "")


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def fake(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_bottleneck_runs_its_1x1_convolutions_fused(layout):
    with FakeTensorMode(), Calls() as calls, preact.use_backend("cpp"):
        with torch.device("cuda"):
            unit = preact.PreActBottleneck(64, 16)
            x = torch.empty(2, 64, 8, 8).contiguous(memory_format=layout)
        unit(x)
    fused = 2 if layout == torch.channels_last else 0
    assert calls.names.count("preact.batch_norm_relu_conv2d.default") == fused
    assert calls.names.count("aten.convolution.default") == 3 - fused


def test_what_the_matrix_product_takes():
    def fuses(input, weight, geometry=POINTWISE, backend="cpp"):
        return plans.fuses_convolution(backend, input, weight, geometry, "forward")

    with FakeTensorMode():
        x, weight = fake(2, 64, 8, 8), fake(32, 64, 1, 1)
        assert all(
            plans.fuses_convolution("cpp", x, weight, POINTWISE, work)
            for work in ("forward", "forward with statistics", "backward")
        )
        assert fuses(x, weight, ((2, 2), (0, 0), (1, 1), 1))
        assert fuses(x.float(), weight.float())
        assert not fuses(x.float(), weight), "autocast's first layer"
        assert not fuses(x.double(), weight.double())
        assert not fuses(x, fake(32, 64, 3, 3))
        assert not fuses(x, weight, ((1, 1), (1, 1), (1, 1), 1))
        assert not fuses(x, fake(32, 32, 1, 1), ((1, 1), (0, 0), (1, 1), 2))
        assert not fuses(x.contiguous(), weight)
        assert not fuses(x, fake(4096, 64, 1, 1))
        for plan, fused in (("A", False), ("B", False), ("C", True), ("E", True)):
            with plans.use_plan(plan):
                assert fuses(x, weight) == fused
        assert not fuses(fake(2, 64, 8, 8, device="meta"), fake(32, 64, 1, 1, device="meta"))


def test_the_kernels_learn_whether_float32_may_be_tf32(monkeypatch):
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert torch.ops.preact.allows_tf32() == allowed
