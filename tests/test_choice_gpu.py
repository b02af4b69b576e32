"""``auto`` on a GPU: every backend that can run is proved there, and each problem is measured."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import preact
from preact import backends, choice, plans, proof, tuning

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def as_in_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    for variable in ("PREACT_TUNE", "PREACT_BACKEND", "PREACT_PLAN"):
        monkeypatch.delenv(variable, raising=False)
    for module, name in (
        (choice, "_known"), (choice, "_decided"), (choice, "_names"), (choice, "_sizes"),
        (proof, "_found"), (tuning, "_chosen"), (plans, "_decided"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, {})


def image(dtype: torch.dtype = torch.float32, size: int = 14) -> torch.Tensor:
    x = torch.randn(8, 32, size, size, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_every_backend_that_can_run_is_right(backend, dtype):
    reason = backends.available("cuda")[backend]
    if reason:
        pytest.skip(reason)
    before = torch.backends.cudnn.conv.fp32_precision
    device = torch.device("cuda", torch.cuda.current_device())
    assert proof.why_not(backend, device, [dtype]) == ""
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_what_is_right_and_the_fastest_and_says_so(dtype, caplog):
    module = preact.PreActBottleneck(32, 8).cuda().to(dtype)
    twin, x = copy.deepcopy(module), image(dtype)
    y = x.detach().clone().requires_grad_()
    state = torch.cuda.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="preact"):
        output = module(x)
        output.float().square().sum().backward()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert caplog.messages == [], "a backend was left out"
    (made,) = choice._decided.values()
    assert made.measured
    assert made.reason.startswith("measured: reference")
    assert all(name in made.reason for name in backends.fused("cuda"))
    with preact.use_backend("reference"):
        expected = twin(y)
        expected.float().square().sum().backward()
    close = {"rtol": 0.1, "atol": 0.1} if dtype != torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(output, expected, **close)
    for mine, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    assert made.reason in str(preact.fuse_(torch.nn.Sequential(module)))


def test_a_capture_runs_what_was_measured_before_it():
    module, x = preact.PreActBasicBlock(32, 32).cuda(), image()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x,))  # warms up first
    (made,) = choice._decided.values()
    assert made.measured
    y = image()
    z = y.detach().clone().requires_grad_()
    for call, leaf in ((graphed, y), (module, z)):
        call(leaf).square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
