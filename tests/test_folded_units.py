"""fold_ in whole pre-activation units: what is folded where, chosen by time, and undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import preact
from preact import folded, folded_choice, folded_units, models, trials, tuning
from preact.folded import runs_in_one_dnn
from preact.models import PreActStage, ResidualUnit

from .tolerances import assert_as_good_as_eager

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


class Theirs(nn.Module):
    """A bottleneck of somebody else's, which ``fuse_`` recognises."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.norm3 = nn.BatchNorm2d(width, affine=False)
        self.conv3 = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return x + self.conv3(torch.relu(self.norm3(y)))


UNITS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: preact.PreActBasicBlock(8, 8),
    "projected": lambda: preact.PreActBasicBlock(8, 12, 2),
    "bottleneck": lambda: preact.PreActBottleneck(8, 2),
    "projected bottleneck": lambda: preact.PreActBottleneck(8, 4, 2),
    "unit": lambda: ResidualUnit(8, 2, layers="bottleneck"),
    "theirs": lambda: Theirs(8, 4),
}


def settled(model: nn.Module) -> nn.Module:
    """In evaluation, with the statistics and parameters of nobody's initialisation."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def image(layout: torch.memory_format = torch.channels_last, channels: int = 8) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, 9, 11).to(memory_format=layout)


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PREACT_TUNE", raising=False)
    for name in ("_known", "_decided"):
        monkeypatch.setattr(folded_choice, name, type(getattr(folded_choice, name))())
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(folded_choice, "_budget", trials.Budget(folded_choice.SECONDS))


@pytest.fixture
def clock(monkeypatch):
    """Folded units take ``clock["folded"]`` of the unfolded ones' time."""
    times = {"folded": 0.5, "asked": 0}

    def measure(runs, device):
        for run in runs:
            run()
        times["asked"] += 1
        return [1.0, times["folded"]]

    monkeypatch.setattr(tuning, "measure", measure)
    return times


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_results(name, layout, autocast, folds):
    dtype = torch.bfloat16 if autocast else torch.float32
    model, x = settled(UNITS[name]()), image(layout).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with preact.use_backend("reference"):
            eager = copy.deepcopy(model)(x)
        preact.fuse_(model)
        unfolded = model(x)
        inner = 1 if isinstance(model, preact.PreActBasicBlock) else 2
        assert len(preact.fold_(model).folded) == inner
        folded = model(x)
        assert folded.dtype == eager.dtype
        assert folded.stride() == eager.stride()
        assert_as_good_as_eager("folded", folded, eager, exact)
        assert torch.equal(folded, unfolded) != runs_in_one_dnn(x)
        assert torch.equal(preact.unfold_(model)(x), unfolded)


@torch.inference_mode()
def test_what_is_faster_is_chosen_once_and_remembered(clock, monkeypatch):
    model, x = settled(UNITS["bottleneck"]()), image()
    expected = model(x)
    preact.fold_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert clock["asked"] == 2, "a gain is confirmed"
    problem, how = next(iter(folded_choice._decided.items()))
    assert "2x8x9x11 float32 channels_last * 2x8x1x1 * 2x2x3x3 * 8x2x1x1 + input" in problem
    assert how == "folded, measured"
    assert f"{problem}: {how}" in str(preact.fold_(model))
    other = settled(UNITS["bottleneck"]())
    preact.fold_(other)
    for unit in (model, other, other):
        unit(x)
    assert clock["asked"] == 2, "the same shapes in another unit"
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(folded_choice, "_known", type(folded_choice._known)())
    model(x)
    assert clock["asked"] == 2, "in another process"
    model(x[:1])
    assert clock["asked"] == 4, "another shape"


@pytest.mark.parametrize("why", ["slower", "hardly faster", "off", "deterministic", "no time"])
@torch.inference_mode()
def test_units_stay_unfolded(why, clock, monkeypatch):
    model, x = settled(UNITS["basic"]()), image()
    expected = model(x)
    preact.fold_(model)
    if why == "off":
        monkeypatch.setenv("PREACT_TUNE", "off")
    elif why == "no time":
        folded_choice._budget.spent = folded_choice.SECONDS
    elif "er" in why and why != "deterministic":
        clock["folded"] = 1.2 if why == "slower" else 0.97
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        for _ in range(2):
            assert torch.equal(model(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock["asked"] == (1 if "er" in why and why != "deterministic" else 0)
    assert "not folded, " in str(preact.fold_(model))


@torch.no_grad()
def test_a_changed_parameter_is_folded_anew(folds):
    model, x = settled(Theirs(8, 4)), image()
    preact.fuse_(model)
    preact.fold_(model)
    changes = {
        "in place": lambda: model.conv1.weight.mul_(2),
        "last weight": lambda: model.conv3.weight.mul_(2),
        "bias": lambda: model.conv3.bias.add_(1),
        "statistics": lambda: model.norm3.running_mean.add_(1),
        "first norm": lambda: model.norm1.running_mean.add_(1),
        "state_dict": lambda: model.load_state_dict(settled(Theirs(8, 4)).state_dict()),
        "another tensor": lambda: setattr(model.norm2, "bias", nn.Parameter(torch.ones(4))),
        "data": lambda: setattr(model.norm2.weight, "data", torch.ones(4)),
        "eps": lambda: setattr(model.norm2, "eps", 0.5),
    }
    for name, change in changes.items():
        before = model(x)
        change()
        expected = preact.unfold_(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(before, model(x)) or name == "state_dict", name


@torch.no_grad()
def test_a_convolution_changed_after_the_choice_is_checked_anew(folds):
    model, x = settled(preact.PreActBasicBlock(8, 8)), image()
    preact.fold_(model)
    model(x)
    original = model.conv2
    for change in ({"padding": (0, 0)}, {"stride": (2, 2)}, {"kernel_size": (1, 1), "padding": 3}):
        options = {"kernel_size": 3, "padding": 1, "bias": False, **change}
        model.conv2 = nn.Conv2d(8, 8, **options)
        with pytest.raises(RuntimeError):
            preact.unfold_(copy.deepcopy(model))(x)
        with pytest.raises(RuntimeError):
            model(x)
    model.conv2 = original
    original.weight = nn.Parameter(torch.randn(1, 8, 3, 3))
    expected = preact.unfold_(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == x.shape, "added with one channel for all"


@torch.inference_mode()
def test_writes_that_are_not_counted_are_seen(folds):
    """Inference tensors have no version counters."""
    model, x = settled(preact.PreActBasicBlock(8, 8)), image()
    preact.fold_(model)
    model(x)
    model.conv1.weight.mul_(3)
    expected = preact.unfold_(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_that_is_used_again_is_not_taken_for_the_same(folds):
    model, x = settled(preact.PreActBasicBlock(8, 8)), image()
    preact.fold_(model)
    weight = model.conv1.weight
    for _ in range(20):
        model(x)
        weight.data = weight.data * 1.5
        weight.data = weight.data * 0.5
        expected = preact.unfold_(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_unit_of_a_stage_alone_does_not_fold_the_others(folds):
    stage = PreActStage(*(ResidualUnit(8, 8) for _ in range(3)))
    settled(stage)
    for index in range(3):
        expected = stage(image())[0]
        preact.fold_(stage[index])
        assert torch.equal(stage(image())[0], expected) == (index < 2)
        if index < 2:
            assert not any(unit.conv1 in folded._folded for unit in stage)


@pytest.mark.parametrize("name", ["bottleneck", "theirs"])
def test_training_and_gradients_run_unfolded(name, folds):
    model, x = settled(UNITS[name]()), image()
    state = copy.deepcopy(model.state_dict())
    preact.fuse_(model)
    plain = copy.deepcopy(model)
    preact.fold_(model)
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for training in (False, True):
        results = []
        for module in (model, plain):
            module.train(training).zero_grad()
            output = module(x)
            output.square().sum().backward()
            results.append([output, *(p.grad for p in module.parameters()), *module.buffers()])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_copies_and_pickles_fold_anew(folds):
    for name in ("bottleneck", "theirs"):
        model, x = settled(UNITS[name]()), image()
        preact.fuse_(model)
        size = len(pickle.dumps(model))
        preact.fold_(model)
        expected = model(x)
        assert len(pickle.dumps(model)) < size + 100, "folded weights are in the pickle"
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
        preact.unfuse_(model)
        assert not torch.equal(model(x), expected), "unfuse_ unfolds"


@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_a_stage_folds_or_runs_together(faster, clock, monkeypatch):
    clock["folded"] = 0.5 if faster else 1.5
    stage, x = settled(PreActStage(*(ResidualUnit(8, 8) for _ in range(5)))), image()
    expected, _ = stage(x)
    preact.fold_(stage)
    stage(x)
    joined = []
    together = folded_units.fused_units
    monkeypatch.setattr(
        folded_units,
        "fused_units",
        lambda x, units, *rest: joined.append(units) or together(x, units),
    )
    found, _ = stage(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, expected) != faster
    assert [len(units) for units in joined] == ([] if faster else [5])
    assert clock["asked"] == (2 if faster else 1)
    stage[3].bn2.train()
    before = stage[3].bn2.running_mean.clone()
    stage(x)
    assert not torch.equal(stage[3].bn2.running_mean, before), "one norm in training"


@torch.no_grad()
def test_a_network_with_an_imagenet_stem(folds):
    model = settled(models.preresnet18(num_classes=3))
    x = torch.randn(2, 3, 40, 40).to(memory_format=torch.channels_last)
    expected = model(x)
    report = preact.fold_(model)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, expected)
    reasons = {entry.name: entry.reason for entry in report.folded}
    assert reasons.pop("stem_norm") == "in the convolution before it"
    assert len(reasons) == 7, "all but the first unit's, which is activated before its split"
    assert all(name.endswith("bn2") and "faster" in reason for name, reason in reasons.items())
    skipped = [entry.name for entry in report.skipped if not entry.name.endswith("bn1")]
    assert skipped == ["stages.0.0.bn2", "norm"]
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls, "a hook's module is called"


@torch.no_grad()
def test_wrong_inputs_raise_as_unfolded(clock):
    model = settled(UNITS["bottleneck"]())
    preact.fold_(model)
    with pytest.raises(RuntimeError, match="must have 6 elements"):
        model(image(channels=6))
    with pytest.raises(ValueError, match="4D"):
        model(torch.randn(2, 8, 3))
    assert model(image()[:0]).shape == (0, 8, 9, 11)
    assert model.double()(image().double()).dtype == torch.float64
    assert clock["asked"] == 0


@torch.no_grad()
def test_dense_blocks_say_why_not():
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)
    preact.fuse_(block.eval())
    report = preact.fold_(block)
    assert not report.folded
    assert {entry.reason for entry in report.skipped} == {
        "a dense block's kernels apply it without a pass"
    }
