"""The paper's networks: parameter counts, their layout (sections 3.2 and 5), foreign weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import preact
from preact import models
from preact.models import shortcuts

from .kuangliu_style import PreActNet
from .tolerances import assert_same_in_float64

CIFAR10 = {20: 272_282, 56: 855_578, 110: 1_730_522, 164: 1_703_258, 1001: 10_327_706}
CIFAR100 = {110: 1_736_372, 164: 1_726_388, 1001: 10_350_836}
IMAGENET = {
    18: 11_687_848, 34: 21_796_008, 50: 25_549_480, 101: 44_541_608, 152: 60_185_256,
    200: 64_666_280,
}  # fmt: skip
ORIGINAL = {152: 60_192_808, 200: 64_673_832}
RESNET110_A = 1_727_962


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def built(name: str, **arguments: object) -> models.PreResNet:
    with torch.device("meta"):
        return getattr(models, name)(**arguments)


@pytest.mark.parametrize(
    ("depth", "arguments", "expected"),
    [(d, {"num_classes": 10}, n) for d, n in CIFAR10.items()]
    + [(d, {"num_classes": 100}, n) for d, n in CIFAR100.items()]
    + [(d, {"num_classes": 1000}, n) for d, n in IMAGENET.items()]
    + [(d, {"unit": "original"}, n) for d, n in ORIGINAL.items()]
    + [
        (110, {"option": "A"}, RESNET110_A),
        (110, {"option": "A", "unit": "original"}, RESNET110_A),
        (110, {"option": "A", "shortcut": "exclusive_gating"}, RESNET110_A + 96_224),
        (110, {"option": "A", "shortcut": "shortcut_only_gating"}, RESNET110_A + 96_224),
        (110, {"option": "A", "shortcut": "convolution"}, RESNET110_A + 94_208),
    ],
)
def test_parameter_counts(depth, arguments, expected):
    assert count(built(f"preresnet{depth}", **arguments)) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("wideresnet28_10", 36_479_194), ("wideresnet16_8", 10_961_370)]
)
def test_parameter_counts_of_wide_networks(name, expected):
    """Figures of public implementations; ours are equal, as they are without dropout."""
    assert count(built(name)) == expected


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("preresnet20", 20), ("preresnet32", 32), ("preresnet44", 44), ("preresnet83", 83),
        ("preresnet110_one_layer", 110), ("preresnet164", 164),
    ],
)  # fmt: skip
def test_depth_is_the_number_of_weighted_layers(name, depth):
    branch = [
        m for n, m in built(name).named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear)) and not n.endswith("shortcut")
    ]  # fmt: skip
    assert len(branch) == depth


def test_forward_shapes_and_stage_sizes():
    model = models.preresnet20(num_classes=7)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out[0].shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_imagenet_network_and_stride_placement():
    for where, first, second in (("3x3", 1, 2), ("1x1", 2, 1)):
        model = models.preresnet50(num_classes=5, stride_on=where)
        unit = model.stages[1][0]
        assert (unit.conv1.stride[0], unit.conv2.stride[0]) == (first, second)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_first_activation_before_the_split_and_last_one():
    """With zero branches every identity shortcut hands on the signal that entered: activated."""
    model = models.preresnet20(option="A").eval()
    for unit in model.stages[0]:
        nn.init.zeros_(unit.conv2.weight)
    seen = []
    model.stages[0].register_forward_hook(lambda _m, inputs, out: seen.extend([inputs[0], out[0]]))
    model(torch.randn(2, 3, 32, 32))
    entered, left = seen
    bn = model.stages[0][0].bn1
    assert (entered < 0).any()
    torch.testing.assert_close(left, torch.relu(bn(entered)))
    plain = models.preresnet20(activate_before_split=False, last_activation=False)
    assert plain.norm is None
    assert list(dict(model.named_children())) == ["stem", "stages", "norm", "fc"]


def test_option_a_is_a_strided_identity_with_zero_channels():
    x = torch.randn(2, 4, 7, 6)
    y = shortcuts.ZeroPad(3, 2)(x)
    assert y.shape == (2, 7, 4, 3)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"unit": "preactivation"}, {"shortcut": "gating"}, {"layers": "two_layer"},
        {"option": "C"}, {"stride_on": "5x5"},
    ],
)  # fmt: skip
def test_unknown_names_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        models.ResidualUnit(4, 4, **arguments)


def test_hooks_on_units_see_every_call():
    model = models.preresnet20()
    calls = []
    for module in model.modules():
        if isinstance(module, models.ResidualUnit):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 9


REASON = "the addition stands between it and the next ReLU"


@pytest.mark.parametrize(
    ("unit", "unfused"),
    [
        # The last norm of each of nine units; two norms of projections; the norm of the stem.
        ("original", 9 + 2), ("bn_after_addition", 0), ("relu_before_addition", 2),
        ("relu_only_preactivation", 9 + 2 + 1), ("full_preactivation", 0),
    ],
)  # fmt: skip
def test_the_report_says_what_is_not_fused(unit, unfused):
    model = models.preresnet20(unit=unit)
    report = preact.fuse_(model)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (len(report.fused), len(report.skipped)) == (norms - unfused, unfused)
    assert all(reason.startswith("already: ") for _, reason in report.fused)
    if "original" in unit:
        assert report.skipped[0] == ("stages.0.0.bn2", REASON)


@pytest.mark.parametrize(
    ("source", "theirs", "ours"),
    [
        ("torchvision", "resnet18", lambda: models.preresnet18(unit="original")),
        ("torchvision", "resnet50", lambda: models.preresnet50(unit="original")),
        ("timm", "resnetv2_50", lambda: models.preresnet50(stem_norm=False)),
        (
            "kuangliu",
            "",
            lambda: models.PreResNet(
                "basic", [1, 2], [8, 16], 10, stem_channels=8, activate_before_split=False,
                last_activation=False,
            ),
        ),
    ],
)  # fmt: skip
def test_weights_of_other_implementations(source, theirs, ours):
    """Their networks' states give their results here, and leave as they came."""
    if source == "torchvision":
        other = pytest.importorskip("torchvision").models.get_model(theirs, weights=None)
    elif source == "timm":
        other = pytest.importorskip("timm").create_model(theirs, pretrained=False)
    else:
        other = PreActNet()
    model = ours()
    for value in other.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5)  # fresh norms are the identity and would hide a mistake
    before = {key: value.clone() for key, value in other.state_dict().items()}
    models.load_weights(model, before, source)
    exported = models.export_weights(model, source)
    assert exported.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(exported[key].cpu(), value), key
    other.double(), model.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        other.train(training), model.train(training)
        assert_same_in_float64(model(x), other(x))


def test_weights_that_do_not_fit_are_refused():
    model = models.preresnet18(unit="original")
    with pytest.raises(RuntimeError, match="missing"):
        models.load_weights(model, {}, "torchvision")
    with pytest.raises(ValueError, match="source"):
        models.load_weights(model, {}, "elsewhere")
    gated = models.preresnet20(shortcut="exclusive_gating")
    with pytest.raises(ValueError, match="gates"):
        models.export_weights(gated, "torchvision")
