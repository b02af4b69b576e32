"""What only a GPU can show of the Triton backend; ``tests/triton_kernels`` runs there as well."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import preact
from preact import backends, plans

pytest.importorskip("triton")

from preact import tuning

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(plans, "_decided", {})


def block() -> preact.PreActBasicBlock:
    return preact.PreActBasicBlock(32, 32).cuda()


def image() -> torch.Tensor:
    x = torch.randn(8, 32, 14, 14, device="cuda")
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def image_like(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def test_the_backend_can_run_here():
    assert backends.available("cuda")["triton"] == ""


def test_captured_in_a_cuda_graph():
    """No launcher synchronises, and a replay reads the new input."""
    module, x = block(), image()
    plain = copy.deepcopy(module)
    with preact.use_backend("triton"):
        graphed = torch.cuda.make_graphed_callables(module, (x,))
        plain.load_state_dict(module.state_dict())
        y = image()
        z = y.detach().clone().requires_grad_()
        outputs = graphed(y), plain(z)
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(y.grad, z.grad)


def test_compiled_by_inductor_equals_uncompiled():
    module, x = block(), image()
    twin, y = copy.deepcopy(module), x.detach().clone().requires_grad_()
    with preact.use_backend("triton"):
        outputs = module(x), torch.compile(twin, fullgraph=True)(y)
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(x.grad, y.grad)


def test_measuring_leaves_running_statistics_alone_and_is_kept_on_disk():
    module, x = block(), image()
    twin = copy.deepcopy(module)
    with preact.use_backend("triton"):
        module(x).sum().backward()
        assert tuning._chosen, "nothing was measured"
        twin(x.detach()).sum()
    for measured, known in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(measured, known)
    stored = json.loads(tuning.cache_file(x.device).read_text())
    assert len(stored) == len(tuning._chosen)


def test_the_plan_is_measured_at_the_first_call_and_kept():
    module, x = block(), image()
    with preact.use_backend("triton"):
        module(x).sum().backward()
        first = dict(plans._decided)
        module(x).sum().backward()
    assert {problem.work for problem in first} >= {"forward with statistics", "backward"}
    assert all(how == "measured" for _, how in first.values())
    assert plans._decided == first
    stored = json.loads(tuning.cache_file(x.device).read_text())
    assert sum(entry.startswith("plan ") for entry in stored) == len(first)
    report = preact.fuse_(torch.nn.Sequential(module))
    assert report.plan.count("measured") >= 1 + len(first)


def test_a_first_call_under_capture_takes_the_model(monkeypatch):
    """Nothing is measured there, and nothing remembered that was not."""
    module, x = block(), image().detach()
    asked: list[int] = []
    monkeypatch.setattr(
        tuning, "measure", lambda runs, device: asked.append(len(runs)) or [0.0, 1.0]
    )
    with preact.use_backend("triton"), torch.no_grad():
        monkeypatch.setenv("PREACT_TUNE", "off")  # kernels are compiled before a capture
        expected = module.eval()(x)
        monkeypatch.setenv("PREACT_TUNE", "auto")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)
        graph.replay()
    torch.testing.assert_close(captured, expected)
    assert asked == []
    assert plans._decided == {}


@pytest.mark.parametrize("plan", ["A", "B", "C", "D", "E"])
def test_each_plan_captured_and_compiled(plan):
    module, x = block(), image()
    with preact.use_backend("triton"), preact.use_plan(plan):
        twin, y = copy.deepcopy(module), x.detach().clone().requires_grad_()
        outputs = module(x), torch.compile(twin, fullgraph=True)(y)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(x.grad, y.grad)
        torch._dynamo.reset()
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module).eval(), (image(),))
        torch.testing.assert_close(graphed(image_like(x)), module.eval()(x))


@pytest.mark.parametrize("plan", ["auto", "A", "B", "C", "D", "E"])
def test_a_step_repeats_bit_for_bit(plan):
    results = []
    state = block().state_dict()
    x = image().detach()
    for _ in range(2):
        module = block()
        module.load_state_dict(state)
        y = x.clone().requires_grad_()
        with preact.use_backend("triton"), preact.use_plan(plan):
            output = module(y)
            output.square().sum().backward()
        results.append([output, y.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
