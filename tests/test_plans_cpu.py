"""Our convolution or the library's on the CPU: by written limits, or measured where asked for."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import preact
from preact import device, plans, remembered, trials, tuning
from preact.backends import available, cpp

pytestmark = [
    pytest.mark.skipif(available()["cpp"] != "", reason=f"no kernels: {available()['cpp']}"),
    pytest.mark.skipif(
        available()["cpp"] == "" and cpp.cpu_capability() == "baseline",
        reason="without AVX2 the convolutions are the library's",
    ),
]

SAME = ((1, 1), (1, 1), (1, 1), 1)
POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    for variable in ("PREACT_PLAN", "PREACT_TUNE", "PREACT_CONV"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(plans, "_decided", {})
    monkeypatch.setattr(remembered, "_calls", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(trials.PLANS, "spent", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """The other choice takes ``clock["other"]`` of the written one's time; counts measurements."""
    times = {"other": 0.5, "asked": 0}

    def measure(runs, _device):
        for run in runs:
            run()
        times["asked"] += 1
        return [1.0, times["other"]]

    monkeypatch.setattr(tuning, "measure", measure)
    return times


def operands(
    outs: int, channels: int, kernel: int = 1, batch: int = 4, size: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, channels, size, size)
    weight = torch.randn(outs, channels, kernel, kernel)
    return x.contiguous(memory_format=torch.channels_last), weight


def fuses(x: torch.Tensor, weight: torch.Tensor, geometry=POINTWISE, work="backward") -> bool:
    return plans.fuses_convolution("cpp", x, weight, geometry, work)


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_written_limits_for_little_work_and_where_measuring_is_off(setting, clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", setting)
    if setting == "off":
        monkeypatch.setattr(plans, "ENOUGH", 0)
    assert fuses(*operands(256, 512))
    assert not fuses(*operands(512, 512))
    assert clock["asked"] == 0
    assert "by written limits" in plans.describe("cpu")


@pytest.mark.parametrize(
    ("batch", "threads", "size", "work", "ours"),
    [
        (1, 2, 8, "backward", True),  # so little that the other thread is not missed
        (1, 2, 32, "backward", False),
        (1, 2, 32, "forward", True),  # bands of rows
        (1, 4, 32, "forward with statistics", True),
        (1, 16, 32, "forward", False),  # of which there are 4
        (1, 2, 32, "dense block", True),
        (1, 16, 32, "dense block", False),
        (6, 8, 32, "backward", True),
        (5, 8, 32, "backward", False),
        (9, 8, 32, "backward", False),
        (9, 8, 32, "dense block", True),
        (9, 8, 4, "backward", True),
        (64, 16, 32, "forward", True),
    ],
)
def test_threads_are_not_left_without_an_image(batch, threads, size, work, ours, monkeypatch):
    monkeypatch.setattr(cpp, "_threads", lambda: threads)
    x, weight = operands(64, 64, 3, batch, size)
    assert fuses(x, weight, SAME, work) is ours
    pointwise = operands(16, 64, 1, 1, 32)
    assert fuses(*pointwise), "pixels are divided among threads"


@pytest.mark.parametrize(("size", "ours"), [(14, False), (16, True)])
def test_many_weights_for_few_pixels_are_the_librarys(size, ours, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "off")
    assert fuses(*operands(256, 512, 1, 1, size)) is ours
    assert fuses(*operands(64, 512, 1, 1, size)), "few weights"


@pytest.mark.parametrize(
    ("kernels", "library"), [(True, True), (False, True), (False, False)], ids=str
)
def test_bfloat16_is_ours_where_the_processor_does_not_multiply_it(kernels, library, monkeypatch):
    monkeypatch.setattr(cpp, "_multiplies_bfloat16", lambda: kernels)
    monkeypatch.setattr(cpp, "_library_multiplies_bfloat16", lambda: library)
    monkeypatch.setenv("PREACT_TUNE", "off")
    for outs, channels, kernel, geometry, work in [
        (256, 256, 3, SAME, "backward"),
        (512, 1024, 1, POINTWISE, "forward with statistics"),
        (256, 64, 1, POINTWISE, "forward"),  # widens
    ]:
        x, weight = (t.bfloat16() for t in operands(outs, channels, kernel))
        assert fuses(x, weight, geometry, work) is not library
    x, weight = (t.bfloat16() for t in operands(32, 16))
    assert fuses(x, weight) is not (library and not kernels)


@pytest.mark.parametrize("names", [("ONEDNN",), ("DNNL",), ("ONEDNN", "DNNL")], ids=str)
def test_a_lowered_library_multiplies_no_bfloat16(names, monkeypatch):
    for name in ("ONEDNN", "DNNL"):
        monkeypatch.delenv(f"{name}_MAX_CPU_ISA", raising=False)
    decide = cpp._decide_library_bfloat16.__wrapped__
    plain = decide()
    for name in names:
        monkeypatch.setenv(f"{name}_MAX_CPU_ISA", "")
    assert decide() is plain
    for isa in ("avx2", "AVX512_CORE"):
        monkeypatch.setenv(f"{names[-1]}_MAX_CPU_ISA", isa)
        assert not decide()
    monkeypatch.setenv(f"{names[-1]}_MAX_CPU_ISA", "ALL")
    assert decide() is plain


def test_what_was_measured_holds_for_processors_of_one_model_and_setting(monkeypatch):
    cpu = torch.device("cpu")
    for name in device._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plain = device.description(cpu)
    monkeypatch.setenv("PREACT_CPU_CAPABILITY", "avx2")
    assert device.description(cpu) == f"{plain}-PREACT_CPU_CAPABILITY=avx2"
    monkeypatch.setattr(device, "_model", lambda: ["26", "17"])
    assert not device.description(cpu).startswith(plain)


def test_enough_work_is_measured_by_default(clock):
    large = operands(256, 512, size=16)
    assert not fuses(*large)
    assert clock["asked"] == 2, "a departure from the written choice is confirmed"
    assert fuses(*operands(256, 512)), "too little to matter"
    assert clock["asked"] == 2


def test_a_gain_that_is_not_confirmed_is_none(clock, monkeypatch):
    times = iter([[1.0, 0.5], [1.0, 0.95]])
    monkeypatch.setattr(tuning, "measure", lambda runs, device: next(times))
    assert fuses(*operands(256, 512, size=16))
    assert next(times, None) is None


def test_the_time_for_measuring_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(trials.PLANS, "spent", tuning.CPU_SECONDS)
    large = operands(256, 512, size=16)
    assert fuses(*large)
    assert clock["asked"] == 0
    assert "by its limit, no time left to measure" in plans.describe("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(trials, "fastest", None)
        assert fuses(*large), "decided once, not at every call"
    monkeypatch.setenv("PREACT_TUNE", "measure")
    assert not fuses(*large), "as long as it takes, where asked for"


def test_a_dispatch_mode_or_a_trace_is_no_place_to_measure(clock, monkeypatch):
    monkeypatch.setattr(plans, "ENOUGH", 0)
    with FlopCounterMode(display=False):
        assert fuses(*operands(256, 512))
    monkeypatch.setattr(torch._C, "_get_tracing_state", lambda: object())
    assert fuses(*operands(256, 512))
    assert clock["asked"] == 0


def test_a_remembered_call_asks_nobody(clock, monkeypatch):
    asked = []
    decide = plans.fuses_convolution
    monkeypatch.setattr(plans, "fuses_convolution", lambda *a: asked.append(a) or decide(*a))
    module = preact.BatchNormReLUConv2d(64, 256, 1).to(memory_format=torch.channels_last)
    x = operands(1, 64, size=16)[0]
    for _ in range(3):
        with torch.no_grad():
            module(x)
    assert len(asked) == 1


def test_measured_once_near_the_limit_and_kept(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    near = operands(256, 512)
    assert not fuses(*near), "the clock found the other one faster"
    assert not fuses(*near)
    assert clock["asked"] == 2, "confirmed"
    assert fuses(*operands(512, 512))
    assert fuses(*near, work="forward with statistics")
    assert clock["asked"] == 6
    (kept,) = list(json.loads(tuning.cache_file(near[0].device).read_text()).items())[:1]
    assert kept[0].startswith("plan backward (4, 512, 8, 8)")
    plans._decided.clear()
    tuning._chosen.clear()
    assert not fuses(*near)
    assert clock["asked"] == 6, "another process reads the file"
    text = plans.describe("cpu")
    assert "measured near them" in text
    assert "backward 4x512x8x8 * 256x512x1x1 float32 channels_last: the library, measured" in text


def test_only_a_clear_gain_departs_from_the_written_choice(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    clock["other"] = 0.95
    assert fuses(*operands(256, 512))
    assert not fuses(*operands(512, 512))
    assert clock["asked"] == 2


def test_far_from_the_limit_nothing_is_measured(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    assert fuses(*operands(16, 16))
    assert not fuses(*operands(1024, 1024, size=2))
    assert clock["asked"] == 0


def test_a_first_call_of_one_image_says_nothing_of_a_batch(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    monkeypatch.setattr(cpp, "_threads", lambda: 2)
    assert not fuses(*operands(256, 512, batch=1, size=16))
    assert not fuses(*operands(64, 256, 3, batch=1), SAME), "an image is one thread's: not ours"
    assert clock["asked"] == 2
    clock["other"] = 2.0
    assert fuses(*operands(256, 512, batch=8, size=16)), "measured for itself"
    assert clock["asked"] == 3


def test_batches_and_sizes_are_few_problems():
    def of(batch: int, size: int) -> trials.Problem:
        x, weight = operands(16, 512, batch=batch, size=size)
        return trials.of_sizes_on_cpu(plans._problem(x, weight, POINTWISE, "backward"))

    assert of(256, 14) == of(128, 14)
    assert of(4, 14) != of(8, 14)
    assert [of(4, size).input_shape[2] for size in (7, 14, 28, 56, 57, 60)] == [
        7, 14, 28, 56, 56, 64,
    ]  # fmt: skip
    assert len({of(4, size) for size in range(1, 65)}) == 20


def test_nothing_is_measured_while_compiling_or_deterministic(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    monkeypatch.setattr(plans, "NEAR", 1e9)
    torch._dynamo.reset()
    module = torch.compile(preact.PreActBasicBlock(16, 16), fullgraph=True, backend="aot_eager")
    module(operands(1, 16)[0].requires_grad_()).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        assert fuses(*operands(256, 512))
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock["asked"] == 0
    assert plans._decided == {}


@pytest.mark.parametrize("work", ["forward", "forward with statistics", "backward"])
def test_both_ways_of_a_trial_agree(work):
    x, weight = operands(24, 16, 3)
    problem = trials.of_sizes_on_cpu(plans._problem(x, weight, SAME, work))
    state = torch.random.get_rng_state()
    trial = trials.Trial(problem, problem.device, "cpp")
    own, other = trial.run(True), trial.run(False)
    assert torch.equal(torch.random.get_rng_state(), state)
    if work == "backward":
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    elif work == "forward":
        torch.testing.assert_close(own[0], other, rtol=1e-4, atol=1e-4)
    else:
        for mine, theirs in zip(own[1:], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_measured_unit_gives_eagers_gradients(monkeypatch):
    """By the real clock, whatever it finds; the running statistics see one batch."""
    monkeypatch.setenv("PREACT_TUNE", "measure")
    monkeypatch.setattr(plans, "NEAR", 1e9)
    module = preact.PreActBottleneck(64, 16)
    twin = preact.PreActBottleneck(64, 16)
    twin.load_state_dict(module.state_dict())
    x = operands(1, 64)[0].requires_grad_()
    results = []
    for each, backend in ((module, "cpp"), (twin, "reference")):
        with preact.use_backend(backend):
            results.append(torch.autograd.grad(each(x).square().mean(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    works = {problem.work for problem in plans._decided}
    assert works == {"forward with statistics", "backward"}


def test_a_forced_plan_is_not_measured(clock, monkeypatch):
    monkeypatch.setenv("PREACT_TUNE", "measure")
    for plan, fused in (("A", False), ("B", False), ("E", True)):
        with preact.use_plan(plan):
            assert fuses(*operands(256, 512)) == fused
    assert clock["asked"] == 0


def test_the_librarys_convolutions_everywhere_are_plan_b(monkeypatch):
    read = functools.partial(cpp._decide_winograd.__wrapped__)
    for name, winograd in (("auto", True), ("direct", False)):
        monkeypatch.setenv("PREACT_CONV", name)
        assert read() == winograd
    monkeypatch.setenv("PREACT_CONV", "library")
    with pytest.raises(ValueError, match="PREACT_PLAN=B"):
        read()
    monkeypatch.setenv("PREACT_CONV", "fastest")
    with pytest.raises(ValueError, match="auto or direct"):
        read()
