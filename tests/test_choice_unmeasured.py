"""``auto`` where nothing may be timed, proved or run: which choice holds there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import preact
from preact import ops, proof, tuning

from .choice_device import (
    Backend,
    chosen,
    image,
    raises,
    ran,
    told_times,
    unbiased,
    unit,
    untried_device,
)


@pytest.fixture
def device(monkeypatch, tmp_path):
    return untried_device(monkeypatch, tmp_path)


@pytest.fixture
def clock(monkeypatch):
    return told_times(monkeypatch)


def test_measuring_off_follows_the_written_default_if_it_is_right(device, clock, monkeypatch):
    fakes = device(first=Backend(raises), second=Backend())
    monkeypatch.setenv("PREACT_TUNE", "off")
    module, x = unit(), image()
    assert ran(fakes.second, lambda: module(x))
    torch.use_deterministic_algorithms(True)
    try:
        monkeypatch.delenv("PREACT_TUNE")
        assert ran(fakes.second, lambda: module(x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock.asked == []
    assert "the written default, as deterministic algorithms" in chosen()[0].reason
    module(x)
    assert len(clock.asked) == 1, "what was not measured is measured when it may be"


def test_while_a_graph_is_captured_only_what_was_measured_before_runs(device, clock, monkeypatch):
    fakes = device(first=Backend())
    module, x = unit(), image()
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert not ran(fakes.first, lambda: module(x)), "neither proved nor timed"
    assert chosen()[0].reason == "a CUDA graph is being captured, and nothing was measured before"
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    module(x)
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert ran(fakes.first, lambda: module(x))
    assert len(clock.asked) == 1


def test_a_dispatch_mode_sees_no_trial(device, clock):
    fakes = device(first=Backend())
    module, x = unit(), image()
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(x)
    assert fakes.first.calls == []
    assert clock.asked == []


def test_a_compiled_call_is_eager_and_measures_nothing(device, clock):
    fakes = device(first=Backend())
    torch._dynamo.reset()
    module, x = unit(), image()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    assert fakes.first.calls == []
    assert clock.asked == []
    with preact.use_backend("reference"):
        torch.testing.assert_close(output, module(x))
    module(x)
    torch._dynamo.reset()
    before = len(fakes.first.calls)
    torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert len(fakes.first.calls) == before, "measured uncompiled says nothing of the compiler's"


def test_tf32_by_the_setting_of_convolutions_alone(device, clock):
    """What PyTorch raises for, where convolutions and RNNs differ, is not asked."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    device(first=Backend())
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            unit()(image())
            with proof._tf32(precision == "ieee", torch.device("cuda")):
                assert ops.allows_tf32() == (precision == "ieee")
            assert conv.fp32_precision == precision
    finally:
        conv.fp32_precision = before
    assert len(clock.asked) == 2, "a setting that changes what is fastest"


def test_a_forced_backend_is_neither_proved_nor_timed(device, clock):
    fakes = device(first=Backend(unbiased))
    with preact.use_backend("first"):
        assert ran(fakes.first, lambda: unit()(image()))
    assert clock.asked == []
    assert proof.results() == {}


def test_too_little_memory_leaves_it_to_eager_for_good(device, clock, monkeypatch):
    device(first=Backend())
    tries = []

    def measure(runs, device):
        tries.append(runs)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(tuning, "measure", measure)
    module, x = unit(), image()
    module(x), module(x)
    assert len(tries) == 1
    assert chosen()[0].reason == "too little memory to measure"
