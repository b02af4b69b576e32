"""The modules as drop-ins: state, running statistics, modes, copies, pickles."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import preact


class EagerPrefix(nn.Module):
    """BatchNormReLUConv2d as anybody would write it."""

    def __init__(self, *args, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, **kw):
        super().__init__()
        self.norm = nn.BatchNorm2d(args[0], eps, momentum, affine, track_running_stats)
        self.conv = nn.Conv2d(*args, **{"bias": False, **kw})

    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


class EagerBasicBlock(nn.Module):
    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        activation = torch.relu(self.bn1(x))
        shortcut = self.shortcut(activation) if hasattr(self, "shortcut") else x
        return self.conv2(torch.relu(self.bn2(self.conv1(activation)))) + shortcut


def assert_same_state(fused, eager):
    assert list(fused.state_dict()) == list(eager.state_dict())
    for (name, a), b in zip(fused.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_options(momentum, affine, track):
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track, "eps": 1e-3}
    fused = preact.BatchNormReLUConv2d(6, 5, 3, padding=1, **options)
    eager = EagerPrefix(6, 5, 3, padding=1, **options)
    eager.load_state_dict(fused.state_dict())
    norm = preact.BatchNormReLU2d(6, **options)
    eager_norm = nn.BatchNorm2d(6, **options)
    for step, training in itertools.product(range(3), [True, False]):
        x = torch.randn(4, 6, 5, 5) * (step + 1) + step
        for a, b in ((fused, eager), (norm, lambda v: torch.relu(eager_norm(v)))):
            for module in (fused, eager, norm, eager_norm):
                module.train(training)
            torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)
        assert_same_state(fused, eager)
        assert_same_state(norm, eager_norm)


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 1), (8, 2)])
def test_unit_state_and_results(channels, stride):
    fused, eager = (
        preact.PreActBasicBlock(8, channels, stride),
        EagerBasicBlock(8, channels, stride),
    )
    assert list(fused.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(fused.state_dict())
    for training in (True, False):
        fused.train(training), eager.train(training)
        x = torch.randn(3, 8, 6, 6)
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
        assert_same_state(fused, eager)


def test_frozen_statistics_inside_a_training_network():
    fused, eager = preact.PreActBasicBlock(8, 8), EagerBasicBlock(8, 8)
    eager.load_state_dict(fused.state_dict())
    fused.bn2.eval(), eager.bn2.eval()
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    assert_same_state(fused, eager)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: preact.BatchNormReLU2d(8),
        lambda: preact.BatchNormReLUConv2d(8, 4, 3, save_activation=True),
        lambda: preact.PreActBottleneck(8, 4, 2),
        preact.IdentityAdd,
    ],
)
def test_copies(make, how):
    module = make()
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    arguments = (torch.randn(2, 8, 6, 6),) * (2 if isinstance(module, preact.IdentityAdd) else 1)
    assert torch.equal(module(*arguments), twin(*arguments))


def test_save_activation_changes_what_is_kept_and_nothing_else():
    x = torch.randn(4, 8, 6, 6)
    kept, results = [], []
    module = preact.PreActBasicBlock(8, 8)
    for save in (False, True):
        module.save_activation = save
        module.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            output = module(x)
        output.square().sum().backward()
        kept.append(sum(size for size in sizes if size >= x.numel()))
        results.append([output, *(p.grad.clone() for p in module.parameters())])
    assert kept == [2 * x.numel(), 4 * x.numel()]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_other_memory_formats_and_shapes_of_the_result():
    module = preact.PreActBasicBlock(16, 32, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 9, 7).contiguous(memory_format=layout)
        with preact.use_backend("reference"):
            expected = module(x)
        output = module(x)
        assert output.shape == expected.shape == (2, 32, 5, 4)
        assert output.stride() == expected.stride()
