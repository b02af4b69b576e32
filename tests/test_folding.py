"""fold_: evaluation with batch norms in the convolutions before them, the rest as ever."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import preact
from preact import trials
from preact.folded import runs_in_one_dnn

from .tolerances import assert_as_good_as_eager

pytestmark = pytest.mark.usefixtures("folds")


class Bottleneck(nn.Module):
    """Post-activation: three convolutions, the last norm read by the addition."""

    def __init__(self, channels: int, **norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 1)
        self.bn1 = nn.BatchNorm2d(8, **norm)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8, **norm)
        self.conv3 = nn.Conv2d(8, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels, **norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x[:, :, ::2, ::2]
        return self.relu(y)


def block(**norm: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Bottleneck(6, **norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def image(layout: torch.memory_format = torch.channels_last) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, 9, 11).to(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_results(layout, affine, autocast):
    model, x = block(affine=affine), image(layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = model(x)
        exact = copy.deepcopy(model).double()(x.double()) if not autocast else None
    if exact is None:
        with torch.autocast("cpu", enabled=False):
            exact = copy.deepcopy(model).double()(x.double())
    preact.fuse_(model)
    assert preact.fold_(model).names == ["bn1", "bn2", "bn3"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        folded = model(x)
    assert folded.dtype == eager.dtype
    assert folded.stride() == eager.stride()
    assert_as_good_as_eager("folded", folded, eager, exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unfolded = preact.unfold_(copy.deepcopy(model))(x)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert torch.equal(folded, unfolded) != runs_in_one_dnn(x.to(dtype))


def test_state_and_training_are_as_without():
    model, x = block(), image()
    before = copy.deepcopy(model.state_dict())
    preact.fuse_(model)
    plain = copy.deepcopy(model)
    preact.fold_(model)
    with torch.no_grad():
        model(x)
    for module in (model, preact.unfold_(copy.deepcopy(model))):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for training in (True, False):
        results = []
        for module in (model, plain):
            module.train(training).zero_grad()
            output = module(x)
            output.square().sum().backward()
            results.append([output, *(p.grad for p in module.parameters())])
        for folded, unfolded in zip(*results, strict=True):
            torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-5)
    assert model.bn1.num_batches_tracked == 1


@torch.no_grad()
def test_a_changed_parameter_is_folded_anew():
    model, x = block(), image()
    preact.fuse_(model)
    preact.fold_(model)
    changes = {
        "in place": lambda: model.conv2.weight.mul_(2),
        "statistics": lambda: model.bn1.running_mean.add_(1),
        "state_dict": lambda: model.load_state_dict(block(affine=True).state_dict()),
        "another tensor": lambda: setattr(model.bn2, "bias", nn.Parameter(torch.ones(8))),
        "data": lambda: setattr(model.bn3.weight, "data", torch.ones(6)),
    }
    for name, change in changes.items():
        model(x)
        change()
        expected = preact.unfold_(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_copies_and_pickles_stay_folded():
    model, x = block(), image()
    preact.fuse_(model)
    preact.fold_(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    preact.unfuse_(model)
    assert type(model) is Bottleneck
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_a_chain_is_folded_where_that_is_faster(faster, monkeypatch):
    asked = []

    def select(op, key, ways, run, *rest):
        for way in ways:
            run(way)
        asked.append(key)
        return ways[faster]

    monkeypatch.setattr(trials, "select_on_cpu", select)
    model, x = block(), image()
    expected = (preact.fuse_(model), model(x))[1]
    report = preact.fold_(model)
    for _ in range(2):
        found = model(x)
    assert torch.equal(found, expected) != faster
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (key,) = asked
    chain = "* 8x6x1x1 bias relu * 8x4x3x3 stride (2, 2) groups 2 relu * 6x8x1x1 "
    assert chain in key
    assert all("faster" in entry.reason for entry in report.folded)


@torch.no_grad()
def test_a_chain_ends_in_a_convolution_that_no_norm_follows():
    layers = [nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 6, 3)]
    model = nn.Sequential(*layers, nn.Tanh()).eval()
    model[1].running_mean.normal_()
    expected = model(image())
    preact.fuse_(model)
    assert preact.fold_(model).names == ["1"]
    found = model(image())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        model(image()[:, :5])
    model.double()
    torch.testing.assert_close(model(image().double()), expected.double(), rtol=1e-4, atol=1e-5)


def test_a_convolution_stays_with_the_norm_before_it():
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(6, 6, 1)).eval()
    with torch.no_grad():
        expected = model(image())
        preact.fuse_(model)
        assert preact.fold_(model).names == []
        torch.testing.assert_close(model(image()), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_stays_with_the_pooling_behind_it():
    """Which reads the convolution's result once; the stem of a ResNet took 1.13 of that folded."""
    layers = [nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        expected = model(image())
        preact.fuse_(model)
        report = preact.fold_(model)
        assert not report.folded
        assert "the pooling behind it" in report.skipped[0].reason
        torch.testing.assert_close(model(image()), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_folded():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model[2].register_forward_hook(lambda *_: None)
    preact.fuse_(model.eval())
    assert preact.fold_(model).names == []
    without = block(track_running_stats=False)
    preact.fuse_(without)
    preact.fold_(without)
    with torch.no_grad():
        torch.testing.assert_close(
            without(image()), block(track_running_stats=False)(image()), rtol=1e-4, atol=1e-5
        )
