"""``auto`` on a device whose backends nobody has tried: right first, then the fastest.

No GPU is needed: the CPU is made such a device, with backends of the test's own, and everything
from the first call to the report runs as on a GPU (where ``test_choice_gpu.py`` runs it).
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import Tensor

import preact
from preact import backends, choice, environment, proof, tuning

from .choice_device import (
    Backend,
    chosen,
    forget,
    image,
    raises,
    ran,
    told_times,
    unbiased,
    unit,
    untried_device,
    unwritten,
    wrong_in_half,
    wrong_where_large,
)


@pytest.fixture
def device(monkeypatch, tmp_path):
    return untried_device(monkeypatch, tmp_path)


@pytest.fixture
def clock(monkeypatch):
    return told_times(monkeypatch)


def test_the_fastest_that_is_right_runs_forward_and_backward(device, clock):
    fakes = device(first=Backend(), second=Backend())
    module, x = unit(), image()
    module(x)
    assert clock.asked == [["reference", "first", "second"]]
    (made,) = chosen()
    assert made.backend == "first"
    assert made.reason == "measured: reference 2 ms, first 1 ms, second 1.5 ms"
    output = module(x)
    assert clock.asked == [["reference", "first", "second"]], "measured once"
    assert ran(fakes.first, lambda: output.sum().backward())
    assert not ran(fakes.second, lambda: module(x).sum().backward())


def test_results_are_eagers_whatever_was_chosen(device, clock):
    device(first=Backend())
    module, x = unit(), image()
    results = []
    for _ in range(2):
        with preact.use_backend("reference"):
            results.append(torch.autograd.grad(module(x).square().sum(), x)[0])
        results.append(torch.autograd.grad(module(x).square().sum(), x)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_eager_stays_where_it_is_the_fastest(device, clock):
    fakes = device(first=Backend(), second=Backend())
    clock.milliseconds.update(first=2.5, second=3.0)
    module, x = unit(), image()
    module(x)
    assert not ran(fakes.first, lambda: module(x).sum().backward())
    assert not ran(fakes.second, lambda: module(x).sum().backward())
    assert chosen()[0].backend == "reference"


def test_a_slow_backend_is_not_chosen_by_the_real_clock(device):
    fakes = device(first=Backend(seconds=0.002), second=Backend(seconds=0.003))
    with torch.no_grad():
        unit()(image())
        assert not ran(fakes.first, lambda: unit()(image()))
    (made,) = chosen()
    assert made.backend == "reference"
    assert made.measured


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (raises, "fails in float32: RuntimeError: no such instruction"),
        (unbiased, "wrong in float32: batch_norm_stats"),
        (unwritten, "wrong in float32: batch_norm_relu_backward_apply"),
    ],
)
def test_a_backend_that_is_wrong_or_raises_is_left_out_with_one_reason(
    device, clock, caplog, change, reason
):
    fakes = device(first=Backend(change), second=Backend())
    module, x = unit(), image()
    with caplog.at_level(logging.WARNING, logger="preact"):
        module(x).sum().backward()
        module(image(5)).sum().backward()
    assert not ran(fakes.first, lambda: module(x).sum().backward())
    assert clock.asked == [["reference", "second"]] * 2, "what is wrong is not even timed"
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert all(
        made.backend == "second" and f"first is {reason}" in made.reason for made in chosen()
    )


def test_wrong_at_the_problems_own_sizes_alone(device, clock, caplog):
    device(first=Backend(wrong_where_large), second=Backend())
    module = unit()
    with caplog.at_level(logging.WARNING, logger="preact"):
        module(image(6)), module(image(16))
    assert clock.asked == [["reference", "first", "second"], ["reference", "second"]]
    small, large = chosen()
    assert small.backend == "first"
    assert large.backend == "second"
    assert "first is left out here, result 0 is" in large.reason
    assert "from eager's" in caplog.records[0].getMessage()


def test_where_every_backend_is_wrong_eager_runs(device, clock):
    device(first=Backend(raises), second=Backend(unbiased))
    module, x = unit(), image()
    output = module(x)
    assert clock.asked == []
    assert chosen()[0].backend == "reference"
    with preact.use_backend("reference"):
        torch.testing.assert_close(output, module(x), rtol=0, atol=0)


def test_each_type_is_proved_for_itself(device, clock):
    device(first=Backend(wrong_in_half), second=Backend())
    unit()(image())
    unit().bfloat16()(image().bfloat16())
    assert [made.backend for made in chosen()] == ["first", "second"]
    with torch.autocast("cpu", torch.bfloat16):
        unit()(image(7))
    assert chosen()[-1].backend == "second", "autocast computes in both types"


def test_nothing_of_the_callers_is_touched(device, clock):
    """Running statistics, gradients, the random state, saved tensors, the input itself."""
    module, x = unit(), image()
    twin = unit()
    twin.load_state_dict(module.state_dict())
    state, copy = torch.random.get_rng_state(), x.detach().clone()
    saved: list[Tensor] = []
    device(first=Backend())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    first = len(saved)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    assert len(saved) == 2 * first, "the trial's tensors are not the caller's to save"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in module.parameters())
    with preact.use_backend("reference"):
        twin(x), twin(x)
    for mine, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_checkpoints_measure_what_they_compute_again(device, clock):
    device(first=Backend())
    module, x = unit(), image()
    output = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    output.square().sum().backward()
    found, x.grad = x.grad, None
    with preact.use_backend("reference"):
        module(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_other_sizes_take_the_nearest_once_enough_were_measured(device, clock):
    device(first=Backend())
    module = unit()
    for size in range(3, 3 + choice.SIZES):
        module(image(size))
    clock.milliseconds["first"] = 3.0
    module(image(20))
    assert len(clock.asked) == choice.SIZES
    assert chosen()[-1].reason.startswith("as the nearest of")
    unit(16)(image(6, 16))
    assert len(clock.asked) == choice.SIZES + 1, "other channels are another problem"


def test_momentum_and_eps_change_no_choice(device, clock):
    device(first=Backend())
    module, x = unit(), image()
    for momentum in (0.1, 0.2, None):
        for norm in [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            norm.momentum = momentum
        module(x)
    assert len(clock.asked) == 1


def test_gradients_or_none_plan_and_layout_are_problems_of_their_own(device, clock):
    device(first=Backend())
    module, x = unit(), image()
    module(x)
    with torch.no_grad():
        module(x)
    with torch.inference_mode():
        module.eval()(x)
    module.train()(x.detach().contiguous(memory_format=torch.channels_last))
    with preact.use_plan("A"):
        module(x)
    assert len(clock.asked) == 5
    module(x)
    assert len(clock.asked) == 5


def test_kept_on_disk_but_proved_again(device, clock, monkeypatch):
    fakes = device(first=Backend())
    module, x = unit(), image()
    module(x)
    stored = json.loads(tuning.cache_file(x.device).read_text())
    ((entry, value),) = stored.items()
    assert entry.startswith("backend residual_unit 4x8x6x6 * 8x8x3x3, 8x8x3x3 float32 contiguous")
    assert value == ["first", "measured: reference 2 ms, first 1 ms"]
    forget(monkeypatch)
    assert ran(fakes.first, lambda: module(x))
    assert len(clock.asked) == 1
    assert proof.results() != {}
    forget(monkeypatch)
    device(first=Backend(raises))
    module(x)
    assert chosen()[0].backend == "reference", "what the disk says is not believed of a wrong one"


def test_every_public_function_is_chosen_for(device, clock):
    fakes = device(first=Backend())
    x = image()
    vectors = [torch.rand(8) + 0.5 for _ in range(4)]
    calls = [
        lambda: preact.functional.batch_norm_relu(x, *vectors, training=True),
        lambda: preact.functional.batch_norm_relu_conv2d(
            x, *vectors, torch.randn(4, 8, 1, 1), residual=torch.randn(4, 4, 6, 6)
        ),
        lambda: preact.functional.identity_add(x, x, return_statistics=True)[0],
        lambda: unit()(x),
    ]
    for call in calls:
        call()
        assert ran(fakes.first, call)
    assert len(clock.asked) == len(calls)


def test_invalid_arguments_raise_before_any_trial(device, clock):
    device(first=Backend())
    with pytest.raises(RuntimeError, match="elements"):
        preact.functional.batch_norm_relu(image(), torch.ones(3), torch.ones(3))
    assert clock.asked == []


def test_the_reports_say_what_was_chosen_and_why(device, clock, monkeypatch):
    device(first=Backend(unbiased), second=Backend())
    module = torch.nn.Sequential(unit())
    assert "auto on cpu" in preact.fuse_(module).backend
    module(image())
    report = str(preact.fuse_(module))
    assert "first in float32 on cpu: wrong in float32: batch_norm_stats" in report
    assert "second in float32 on cpu: right" in report
    assert "second, measured: reference 2 ms, second 1.5 ms; first is wrong" in report
    forget(monkeypatch)
    rows = environment.report()
    assert rows["automatic choice"].startswith("auto on cpu")
    (kept,) = [value for title, value in rows.items() if title.startswith("kept for cpu")]
    assert "second, measured: reference 2 ms, second 1.5 ms" in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_native_kernels_pass_the_proof(dtype):
    if reason := backends.available("cpu")["cpp"]:
        pytest.skip(f"no native kernels: {reason}")
    state = torch.random.get_rng_state()
    assert proof._prove("cpp", torch.device("cpu"), dtype) == ""
    assert torch.equal(torch.random.get_rng_state(), state)
