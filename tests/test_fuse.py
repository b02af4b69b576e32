"""``fuse_`` changes nothing but speed: results, gradients, state and the model's own life."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import fuse_refused_styles as refused
import fuse_styles as styles
import pytest
import torch
from fuse_checks import agree, fused_kinds, image, norms_run, pair
from torch import nn

import preact

torchvision = pytest.importorskip("torchvision")

ALL = styles.MATCHED | refused.LEFT_ALONE


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The inputs are tiny: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL)
def test_report(name: str) -> None:
    style = ALL[name]
    report = preact.fuse_(style.make())
    assert fused_kinds(report) == style.kinds
    for entry in report.skipped:
        assert style.reason in entry.reason
    assert len(report.skipped) > 0 or name in styles.MATCHED


@pytest.mark.parametrize("name", ALL)
def test_same_results(name: str) -> None:
    """Forward, backward and running statistics, through changes of mode."""
    model, plain = pair(ALL[name].make)
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    preact.fuse_(model)
    assert list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == parameters
    for mode, size in ((True, 6), (True, 5), (False, 6), (True, 6)):
        agree(model.train(mode), plain.train(mode), image(size=size))


@pytest.mark.parametrize("name", styles.MATCHED)
def test_save_activation(name: str) -> None:
    model, plain = pair(ALL[name].make)
    report = preact.fuse_(model, save_activation=True)
    assert fused_kinds(report) == ALL[name].kinds
    agree(model, plain, image())


@pytest.mark.parametrize("make", [styles.AddIntoShortcut, styles.ShortcutChanged])
def test_input_overwritten(make: Callable[[], nn.Module]) -> None:
    model, plain = pair(make)
    assert fused_kinds(preact.fuse_(model)) == (styles.PREFIX,) * 2
    with torch.no_grad():
        a, b = (x := image()).clone(), x.clone()
        torch.testing.assert_close(model(a), plain(b))
        torch.testing.assert_close(a, b)


def test_every_matched_style_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, style in styles.MATCHED.items():
        model = style.make()
        report = preact.fuse_(model)
        expected = 0 if name in ("shared_activation",) else len(report.skipped)
        x = torch.randn(2, styles.C, 6, 6)
        assert norms_run(model, x, monkeypatch) == expected, name


class TestModelsOfOthers:
    def test_densenet121(self) -> None:
        report = preact.fuse_(torchvision.models.densenet121())
        assert report.counts == {
            "batch_norm_relu": 1, "batch_norm_relu_pool2d": 1, "batch_norm_relu_conv2d_pool2d": 3,
            "dense_block": 116, "skipped": 0
        }  # fmt: skip

    def test_densenet(self) -> None:
        def make() -> nn.Module:
            model: nn.Module = torchvision.models.DenseNet(8, (2, 3), 16, num_classes=4)
            return model

        model, plain = pair(make)
        assert not preact.fuse_(model).skipped
        agree(model, plain, image(3, 48))
        agree(model.eval(), plain.eval(), image(3, 48))

    def test_resnet50(self) -> None:
        plain = torchvision.models.resnet50().eval()
        model = copy.deepcopy(plain)
        report = preact.fuse_(model)
        assert report.counts == {
            "batch_norm_relu_pool2d": 1, "batch_norm_relu_conv2d": 32, "skipped": 20
        }  # fmt: skip
        assert {entry.name.split(".")[-1] for entry in report.skipped} == {"bn3", "1"}
        with torch.no_grad():
            x = torch.randn(1, 3, 32, 32)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)

    def test_resnet_blocks(self) -> None:
        block = torchvision.models.resnet.Bottleneck
        model, plain = pair(lambda: nn.Sequential(block(8, 2), block(8, 2), nn.ReLU()))
        assert fused_kinds(preact.fuse_(model)) == (styles.PREFIX,) * 4
        agree(model, plain, image())
        agree(model.eval(), plain.eval(), image())

    def test_timm_preactivation(self) -> None:
        timm = pytest.importorskip("timm")
        resnetv2 = pytest.importorskip("timm.models.resnetv2")

        def make() -> nn.Module:
            layers = timm.layers.BatchNormAct2d
            model: nn.Module = resnetv2.ResNetV2(
                [1, 2], [32, 64], stem_type="same", stem_chs=16, num_classes=4,
                norm_layer=layers, conv_layer=timm.layers.create_conv2d,
            )  # fmt: skip
            return model

        model, plain = pair(make)
        report = preact.fuse_(model)
        assert not report.skipped
        agree(model, plain, image(3, 32, 2))
        agree(model.eval(), plain.eval(), image(3, 32, 2))

    def test_timm_activations(self) -> None:
        timm = pytest.importorskip("timm")

        def make(act: type[nn.Module] | None, drop: type[nn.Module] | None = None) -> nn.Module:
            norm = timm.layers.BatchNormAct2d(
                styles.C, act_layer=act or nn.ReLU, apply_act=act is not None, drop_layer=drop
            )
            return nn.Sequential(norm, styles.conv3())

        assert fused_kinds(preact.fuse_(make(nn.ReLU))) == (styles.PREFIX,)
        assert "SiLU" in preact.fuse_(make(nn.SiLU)).skipped[0].reason
        assert "Conv2d" in preact.fuse_(make(None)).skipped[0].reason
        assert "Dropout" in preact.fuse_(make(nn.ReLU, nn.Dropout)).skipped[0].reason

    def test_own_network(self) -> None:
        model = preact.models.preresnet20()
        report = preact.fuse_(model)
        assert not report.skipped
        assert all(reason.startswith("already") for reason in fused_kinds(report))


class TestReport:
    def test_text(self) -> None:
        report = preact.fuse_(nn.Sequential(styles.Basic(), refused.NoReLU()))
        text = str(report)
        for words in ("0.bn1", "residual_unit", "followed by Conv2d"):
            assert words in text
        assert report.counts == {"residual_unit": 2, "skipped": 2}
        assert "0 normalisation layers: 0 skipped" in str(preact.fuse_(nn.Conv2d(1, 1, 1)))
        with preact.use_backend("reference"):
            assert "on cpu" in preact.fuse_(styles.Basic()).backend

    def test_filter(self) -> None:
        model = nn.Sequential(styles.Basic(), styles.HelperModules(), styles.Basic())
        asked: list[str] = []

        def keep(name: str, module: nn.Module) -> bool:
            asked.append(name)
            return name not in ("", "1", "1.act1") and isinstance(module, nn.Module)

        report = preact.fuse_(model, keep)
        assert asked == ["0", "1.act1", "1.act2", "1", "2", ""]
        assert [entry.name for entry in report.skipped] == ["1.act1.bn"]
        assert report.skipped[0].reason == "left out by filter_fn"
        assert type(model[1]) is styles.HelperModules

    def test_filtered_block_is_not_opened(self) -> None:
        model = styles.HelperModules()
        report = preact.fuse_(model, lambda name, _: name not in ("act1", "act2"))
        assert not report.fused
        assert type(model) is styles.HelperModules

    def test_twice(self) -> None:
        model, plain = pair(lambda: nn.Sequential(styles.Basic(), refused.NoReLU()))
        first = preact.fuse_(model)
        second = preact.fuse_(model)
        assert [e.name for e in first.fused] == [e.name for e in second.fused]
        assert fused_kinds(second) == ("already: residual_unit",) * 2
        assert second.skipped == first.skipped
        agree(model, plain, image())

    def test_shared_names(self) -> None:
        report = preact.fuse_(styles.SharedBlock())
        assert [entry.name for entry in report.fused] == [
            "first.bn1, second.bn1",
            "first.bn2, second.bn2",
        ]

    def test_other_code(self) -> None:
        scripted = torch.jit.script(styles.Basic())
        assert "TorchScript" in preact.fuse_(scripted).skipped[0].reason
        graph = torch.fx.symbolic_trace(styles.Basic())
        assert "torch.fx" in preact.fuse_(graph).skipped[0].reason
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(styles.Basic())
        assert "SyncBatchNorm is not" in preact.fuse_(sync).skipped[0].reason
        volume = nn.Sequential(nn.BatchNorm3d(2), nn.ReLU(), nn.Conv3d(2, 2, 1))
        assert "BatchNorm3d is not" in preact.fuse_(volume).skipped[0].reason
        replaced = styles.Basic()
        replaced.forward = replaced.branch  # type: ignore[method-assign]
        assert "replaced" in preact.fuse_(replaced).skipped[0].reason
