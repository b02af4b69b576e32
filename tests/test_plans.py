"""The choice of a plan: forced, measured once and kept, or by the model where it must be."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from torch import nn

import preact
from preact import backends, plans, trials

pytest.importorskip("triton")

from preact import tuning

LARGE = trials.Problem(
    "forward with statistics", (32, 64, 56, 56), (64, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1,
    "bfloat16", True, "cuda", 0,
)  # fmt: skip


class FakeTrial:
    """Runs nothing; remembers what it was asked for."""

    ran: ClassVar[list[bool]] = []

    def __init__(self, problem: trials.Problem, device: torch.device, backend: str) -> None: ...

    def run(self, own: bool) -> None:
        self.ran.append(own)


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    monkeypatch.setattr(plans, "_decided", {})
    monkeypatch.delenv("PREACT_PLAN", raising=False)
    monkeypatch.setattr(FakeTrial, "ran", [])
    monkeypatch.setattr(trials, "Trial", FakeTrial)


def test_names(monkeypatch):
    assert plans.current() == "auto"
    monkeypatch.setenv("PREACT_PLAN", "D")
    assert plans.current() == "D"
    with preact.use_plan("B"):
        assert plans.current() == "B", "the block outranks the environment"
        with preact.use_plan("auto"):
            assert plans.current() == "auto"
        assert plans.current() == "B"
    monkeypatch.setenv("PREACT_PLAN", "F")
    with pytest.raises(ValueError, match="PREACT_PLAN"):
        plans.current()
    with pytest.raises(ValueError, match="plan must be"), preact.use_plan("F"):
        pass


def test_the_faster_route_is_measured_once_and_kept_on_disk(measured):
    """The fixture's GPU finds the second one faster: what the model does not prefer."""
    own = not plans._by_model(LARGE)
    assert plans._decide(*LARGE) == plans._decide(*LARGE) == own
    assert measured == [2]
    assert FakeTrial.ran == [not own, own]
    stored = json.loads(tuning.cache_file(LARGE.device).read_text())
    ((entry, route),) = stored.items()
    assert entry.startswith("plan forward with statistics (32, 64, 56, 56)")
    assert route == [own]
    plans._decided.clear()  # as in another process
    tuning._chosen.clear()
    assert plans._decide(*LARGE) == own
    assert measured == [2]


def test_another_shape_type_or_work_is_measured_for_itself(measured):
    for other in (
        LARGE,
        LARGE._replace(work="backward"),
        LARGE._replace(dtype="float32"),
        LARGE._replace(input_shape=(16, 64, 56, 56)),
    ):
        plans._decide(*other)
    assert measured == [2] * 4
    plans._decide(*LARGE._replace(device_index=1))
    assert measured == [2] * 4, "a second device of the same kind reads the file"


def test_the_model_decides_where_nothing_may_be_measured_and_is_forgotten(measured, monkeypatch):
    model = plans._by_model(LARGE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plans._decide(*LARGE) == model
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("PREACT_TUNE", "off")
    assert plans._decide(*LARGE) == model
    assert plans._decided == {}
    assert measured == []
    monkeypatch.setenv("PREACT_TUNE", "auto")
    assert plans._decide(*LARGE) != model


def test_too_little_memory_to_measure_leaves_it_to_the_model(measured, monkeypatch):
    def fails(problem: trials.Problem, device: torch.device, backend: str) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(trials, "Trial", fails)
    assert plans._decide(*LARGE) == plans._by_model(LARGE)
    assert plans._decided == {}


def test_the_model_weighs_bytes_against_products():
    """Few products for each byte: ours; many where ours falls behind the library: the library's."""
    assert plans._by_model(LARGE)
    wide = LARGE._replace(
        work="backward", input_shape=(64, 512, 28, 28), weight_shape=(512, 512, 3, 3),
        stride=(2, 2), padding=(1, 1), device_type="cpu", device_index=None,
    )  # fmt: skip
    assert trials.capability(wide) == 90
    assert not plans._by_model(wide)


def test_the_report_shows_the_choice(measured, monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda device_type: "triton")
    monkeypatch.setattr(preact.fuse_.__globals__["backends"], "why_eager", lambda _: "")
    assert "auto: measured at the first call" in plans.describe("cuda")
    plans._decide(*LARGE)
    text = plans.describe("cuda")
    assert "forward with statistics 32x64x56x56 * 64x64x1x1 bfloat16 channels_last" in text
    assert "measured" in text.splitlines()[1]
    with preact.use_plan("D"):
        report = preact.fuse_(nn.Sequential(preact.PreActBasicBlock(4, 4)))
        assert "plan: D, forced" in str(report)


def test_a_forced_plan_on_the_cpu_says_what_is_kept_and_who_convolves():
    """A keeps the activations, B the inputs alone; both leave the convolution to the library."""
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    module = preact.PreActBasicBlock(16, 16)
    results, saved = [], {}
    for plan in ("A", "B", "E"):
        kept: list[torch.Size] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Size] = kept) -> torch.Tensor:
            if tensor.dim() == 4 and tensor.size(0) == 2:
                kept.append(tensor.shape)
            return tensor

        with preact.use_plan(plan):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = module(x)
            results.append(torch.autograd.grad(output.sum(), x)[0])
        saved[plan] = len(kept)
    assert saved == {"A": 4, "B": 2, "E": 2}
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
