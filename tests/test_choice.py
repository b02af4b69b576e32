"""``auto`` on a device whose backends nobody has tried: right first, then the fastest.

No GPU is needed: the CPU is made such a device, with backends of the test's own, and everything
from the first call to the report runs as on a GPU (where ``test_choice_gpu.py`` runs it).
"""

from __future__ import annotations

import json
import logging
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import preact
from preact import backends, choice, environment, ops, plans, proof, reference, tuning

NAN = float("nan")


class Backend:
    """The formulas of ``reference``, counted; ``change`` gets each op's name and results."""

    def __init__(self, change=lambda name, results, first: results, seconds=0.0):
        self.calls: list[str] = []
        for name in ops.SCHEMAS:
            setattr(self, name, self.op(name, change, seconds))

    def op(self, name, change, seconds):
        def run(*arguments):
            self.calls.append(name)
            time.sleep(seconds)
            found = getattr(reference, name)(*arguments)
            several = isinstance(found, tuple)
            results = change(name, list(found) if several else [found], arguments[0])
            return tuple(results) if several else results[0]

        return run


def raises(name, results, first):
    if name == "batch_norm_relu_conv2d_backward":
        raise RuntimeError("no such instruction")
    return results


def unbiased(name, results, first):
    """A variance with n - 1 where n belongs: one per cent in a hundred values."""
    if name == "batch_norm_stats":
        count = first.numel() // first.size(1)
        results[1] = results[1] * count / (count - 1)
    return results


def unwritten(name, results, first):
    """The last pixel of the last image is left as it was."""
    if name == "batch_norm_relu_backward_apply":
        results[0][-1, :, -1, -1] = NAN
    return results


def wrong_where_large(name, results, first):
    """Right on the proof's maps; beyond them a tile is lost."""
    if name == "batch_norm_relu" and first.size(2) > 12:
        results[0][:, :, 12:] = 0
    return results


def wrong_in_half(name, results, first):
    if name == "identity_add" and first.dtype == torch.bfloat16:
        results[0] = results[0] + 1
    return results


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Makes the CPU a device to be measured; ``device(name=Backend)`` are its fused backends."""
    tables: dict[str, Backend] = {}

    def install(**given: Backend) -> SimpleNamespace:
        tables.update(given)
        monkeypatch.setitem(backends.PREFERENCE, "cpu", tuple(given))
        return SimpleNamespace(**given)

    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    for variable in ("PREACT_TUNE", "PREACT_BACKEND", "PREACT_PLAN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "AUTOMATIC", ())
    monkeypatch.setattr(backends, "MEASURED", ("cpu",))
    monkeypatch.setattr(backends, "NAMES", ("reference", "first", "second"))
    monkeypatch.setattr(
        backends, "_why_not", lambda name, _: "" if name in ("reference", *tables) else "absent"
    )
    monkeypatch.setattr(backends, "table", lambda name: tables[name])
    # Whole units by the library's convolutions, in every fake alike.
    monkeypatch.setattr(plans, "fuses_convolution", lambda *_: False)
    forget(monkeypatch)
    return install


def forget(monkeypatch) -> None:
    """As in another process."""
    for module, name in (
        (choice, "_known"), (choice, "_decided"), (choice, "_names"), (choice, "_sizes"),
        (proof, "_found"), (tuning, "_chosen"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, {})


@pytest.fixture
def clock(monkeypatch):
    """Times as the test says them, by backend; what was timed is listed."""
    asked: list[list[str]] = []
    milliseconds = {"reference": 2.0, "first": 1.0, "second": 1.5}

    def measure(runs, device):
        names = [run.args[0] for run in runs]
        asked.append(names)
        for run in runs:
            run()
        return [milliseconds[name] for name in names]

    monkeypatch.setattr(tuning, "measure", measure)
    return SimpleNamespace(asked=asked, milliseconds=milliseconds)


def unit(channels: int = 8) -> preact.PreActBasicBlock:
    return preact.PreActBasicBlock(channels, channels)


def image(size: int = 6, channels: int = 8, batch: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size, requires_grad=True)


def ran(fake: Backend, call) -> bool:
    """Whether a call ran a backend's ops, outside everything that is proved and timed."""
    before = len(fake.calls)
    call()
    return len(fake.calls) > before


def chosen() -> list[choice.Choice]:
    return list(choice._decided.values())


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
