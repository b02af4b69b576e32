"""Whole units by each plan on the Triton backend: what runs, and that it equals eager PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import preact
from preact import costs, plans, trials
from preact import device as devices

from ..evidence import interpreter
from ..tolerances import assert_as_good_as_eager, magnitude
from .test_units import prepared, step

FUSED = {"batch_norm_relu_conv2d", "batch_norm_relu_conv2d_backward"}


class Names(TorchDispatchMode):
    """Names of the ops that run, convolutions of the library as "convolution"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("preact_triton::") or "convolution" in name:
            self.found.append(name.split("::")[1])
        return func(*args, **(kwargs or {}))


def ran(plan: str, module: torch.nn.Module, x: torch.Tensor) -> tuple[list[str], list[str]]:
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_()
    with preact.use_backend("triton"), preact.use_plan(plan):
        with Names() as forward:
            output, _ = module(x, return_statistics=True)
        with Names() as backward:
            output.backward(torch.ones_like(output))
    return forward.found, backward.found


@pytest.mark.parametrize("plan", ["A", "B", "C", "D", "E"])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_equals_eager(name, plan, device):
    module = prepared(name, training=True)
    x = torch.randn(3, 8, 6, 6).to(device).contiguous(memory_format=torch.channels_last)
    with preact.use_plan(plan):
        fused = step(module, x, "triton", torch.float32)
    eager, exact = (step(module, x, "reference", t) for t in (torch.float32, torch.float64))
    terms = max(magnitude(result) for result in exact[1:2])
    for index, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        assert_as_good_as_eager(f"result {index}", a, b, c, terms)


def test_each_plan_runs_its_own_kernels(device):
    module = prepared("basic", training=True).to(device)
    x = torch.randn(2, 8, 4, 4).to(device).contiguous(memory_format=torch.channels_last)
    for plan in ("A", "B"):
        forward, backward = ran(plan, module, x)
        assert not FUSED & {*forward, *backward}
        assert forward.count("convolution") == 2
        assert backward.count("batch_norm_relu") == (2 if plan == "B" else 0)
    for plan in ("C", "D", "E"):
        forward, backward = ran(plan, module, x)
        assert not any("convolution" in name for name in forward + backward)
        assert forward.count("batch_norm_relu_conv2d") == 2
        assert forward.count("identity_add") == (1 if plan == "C" else 0)
        assert backward.count("batch_norm_relu_conv2d_backward") == 2
        assert backward.count("batch_norm_relu_backward_apply") == (1 if plan == "E" else 2)
        assert backward.count("batch_norm_backward_coefficients") == (1 if plan == "E" else 0)


class Reads(TorchDispatchMode):
    """Ops whose result the host waits for, where a map is on a GPU; launchers' own are not seen."""

    WAITED_FOR = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen += 1
        self.found += [name] if name.startswith(self.WAITED_FOR) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not interpreter.ACTIVE, reason="a GPU shows it by capturing")
@pytest.mark.parametrize("plan", ["auto", "A", "B", "C", "D", "E"])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_step_waits_for_no_value(name, plan, device):
    """With what a launcher does (``tests/test_triton_capture.py``) all of what a graph captures."""
    module = prepared(name, training=True)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    with preact.use_backend("triton"), preact.use_plan(plan):
        module(x).sum().backward()  # what is proved and decided at the first call
        with Reads() as reads:
            module(x).sum().backward()
    assert reads.seen > 10
    assert reads.found == []


def test_a_value_that_is_waited_for_is_seen():
    with Reads() as reads:
        torch.ones(1).item()
    assert reads.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("plan", ["A", "B", "C", "D", "E"])
def test_a_unit_saves_the_maps_that_the_model_says(plan, device):
    module = prepared("basic", training=True).to(device)
    x = torch.randn(3, 8, 6, 6).to(device).contiguous(memory_format=torch.channels_last)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with preact.use_backend("triton"), preact.use_plan(plan), hooks:
        module(x.requires_grad_()).sum().backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    maps = sum(size for at, size in saved.items() if at not in own) / x.numel() / x.element_size()
    layer = costs.layer(x.shape, (8, 8, 3, 3), padding=(1, 1))
    # Besides maps there are vectors of a value for each channel.
    assert maps == pytest.approx(costs.saved_maps(plan, [layer] * 2) / x.numel(), rel=0.05)


@pytest.mark.parametrize("work", ["forward", "forward with statistics", "backward", "pending"])
def test_what_is_timed_runs_both_ways(work, device):
    problem = trials.Problem(
        work, (2, 6, 5, 4), (5, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1, "float32", True,
        device.type, device.index,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    trial = trials.Trial(problem, problem.device)
    own, other = trial.run(True), trial.run(False)
    assert torch.equal(state, torch.random.get_rng_state()), "the random state is the user's"
    if work == "forward":
        torch.testing.assert_close(own[0], other, rtol=1e-4, atol=1e-4)
    elif work == "forward with statistics":
        for mine, theirs in zip(own[1:], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    elif work == "pending":
        for mine, theirs in zip(own, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


def test_the_automatic_choice_is_the_models_and_compiles_to_one_graph(device, monkeypatch):
    if device.type == "cuda":
        monkeypatch.setenv("PREACT_TUNE", "off")
    monkeypatch.setattr(plans, "_decided", {})
    assert devices.properties(device).capability >= 80
    module = prepared("basic", training=True).to(device)
    x = torch.randn(2, 8, 4, 4).to(device).contiguous(memory_format=torch.channels_last)
    forward, backward = ran("auto", module, x)
    # Small maps: what launches least is predicted to be the fastest.
    assert "convolution" not in forward
    assert "batch_norm_backward_coefficients" in backward
    torch._dynamo.reset()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with preact.use_backend("triton"):
        outputs = [module(leaves[0]), compiled(leaves[1])]
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
