"""What happens to a fused model afterwards: copies, hooks, changed attributes, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import fuse_styles as styles
import pytest
import torch
from fuse_checks import agree, fused_kinds, image, norms_run, pair
from torch import Tensor, nn

import preact

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The inputs are tiny: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestLife:
    def test_unfuse(self) -> None:
        block = torchvision.models.resnet.BasicBlock
        model, plain = pair(lambda: nn.Sequential(block(8, 8), styles.HelperModules(), nn.ReLU()))
        classes = [type(m) for m in model.modules()]
        members = [dict(m.__dict__) for m in model.modules()]
        preact.fuse_(model)
        assert [type(m) for m in model.modules()] != classes
        assert isinstance(model[0], block)
        assert preact.unfuse_(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert [dict(m.__dict__) for m in model.modules()] == members
        agree(model, plain, image())

    def test_class_extended_by_others(self) -> None:
        """As fully_shard and parametrizations do it, before or after."""
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        model.__class__ = type("Extended", (type(model),), {})
        agree(model, plain, image())
        agree(copy.deepcopy(model), copy.deepcopy(plain), image())
        preact.unfuse_(model)
        agree(model, plain, image())

    def test_replica(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        replica = model._replicate_for_data_parallel()
        with torch.no_grad():
            torch.testing.assert_close(replica(x := image()), plain(x))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "copy"])
    def test_copies_stay_fused(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, plain = pair(lambda: nn.Sequential(styles.Basic(), styles.HelperModules()))
        preact.fuse_(model)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        elif how == "copy":
            twin = copy.copy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert type(twin[0]) is type(model[0])
        with torch.no_grad():
            model[0].bn1.weight.mul_(1.0 if how == "copy" else 3.0)
        agree(twin, plain, image())
        assert norms_run(twin, image(), monkeypatch) == 0
        assert type(preact.unfuse_(twin)[0]) is styles.Basic

    def test_pickle_names_no_generated_class(self) -> None:
        model = styles.Basic()
        preact.fuse_(model)
        assert b"FusedBasic" not in pickle.dumps(model)

    def test_slice_of_a_fused_sequential(self) -> None:
        model, plain = pair(
            lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), styles.conv3(), nn.ReLU())
        )
        preact.fuse_(model)
        agree(model[:3], plain[:3], image())

    def test_load_state_dict(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        _, other = pair(styles.Basic)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        model.load_state_dict(other.state_dict())
        agree(model, other, image())
        plain.load_state_dict(model.state_dict())
        agree(model, plain, image())

    def test_functional_call(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        values = {k: v * 2 for k, v in plain.named_parameters()}
        x = image()
        a = torch.func.functional_call(model, values, x)
        b = torch.func.functional_call(plain, values, x)
        torch.testing.assert_close(a, b)

    def test_fx_and_jit_trace_of_a_fused_model(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        x = image()
        graph = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(graph.eval()(x), plain.eval()(x))
        with torch.no_grad():
            traced = torch.jit.trace(model.eval(), x)
            torch.testing.assert_close(traced(x), plain(x))


class TestChangesAfterwards:
    """What the code depends on may change: the next call notices."""

    def check(self, change: Callable[[Any], Any], make: Callable[[], nn.Module]) -> None:
        model, plain = pair(make)
        preact.fuse_(model)
        agree(model, plain, image())
        change(model)
        change(plain)
        agree(model, plain, image())
        agree(model.eval(), plain.eval(), image())

    @pytest.mark.parametrize(
        "place", ["bn1", "relu", "conv1", "conv3", "bn3", ""], ids=lambda p: p or "block"
    )
    def test_hooks(self, place: str) -> None:
        for kind in (
            "register_forward_hook", "register_forward_pre_hook",
            "register_full_backward_hook", "register_full_backward_pre_hook",
        ):  # fmt: skip
            model, plain = pair(lambda: styles.Bottleneck(inplace="backward" not in kind))  # noqa: B023
            preact.fuse_(model)
            agree(model, plain, image())
            calls: list[int] = []

            def note(*args: Any, calls: list[int] = calls) -> None:
                calls.append(1)

            handles = [getattr(m.get_submodule(place), kind)(note) for m in (model, plain)]
            agree(model, plain, image())
            assert len(calls) == 2 * (3 if place == "relu" else 1)
            for handle in handles:
                handle.remove()
            agree(model, plain, image())

    def test_hook_of_the_outer_module(self) -> None:
        model, plain = pair(lambda: nn.Sequential(nn.Sequential(styles.Basic()), nn.ReLU()))
        preact.fuse_(model)
        seen: list[Tensor] = []
        model[0].register_forward_hook(lambda m, i, o: seen.append(o))
        agree(model, plain, image())
        assert len(seen) == 1

    def test_hook_of_an_opened_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, plain = pair(styles.HelperModules)
        preact.fuse_(model)
        assert norms_run(model, image(), monkeypatch) == 0
        model.load_state_dict(plain.state_dict())
        model.act1.register_forward_hook(lambda m, i, o: o * 2)
        plain.act1.register_forward_hook(lambda m, i, o: o * 2)
        agree(model, plain, image())

    def test_global_hooks(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o: seen.append(type(m).__name__)
        )
        try:
            agree(model, plain, image())
        finally:
            handle.remove()
        assert seen.count("BatchNorm2d") == 4

    def test_old_weight_norm(self) -> None:
        def make() -> nn.Module:
            model = styles.Basic()
            nn.utils.weight_norm(model.conv1)
            return model

        model, plain = pair(make)
        assert fused_kinds(preact.fuse_(model)) == (styles.BN_RELU, styles.PREFIX)
        agree(model, plain, image())

    def test_parametrization(self) -> None:
        self.check(lambda m: nn.utils.parametrizations.weight_norm(m.conv1), styles.Basic)
        model = styles.Basic()
        nn.utils.parametrizations.weight_norm(model.conv1)
        assert fused_kinds(preact.fuse_(model)) == (styles.UNIT,) * 2

    def test_attribute(self) -> None:
        self.check(lambda m: setattr(m, "p", 0.5), lambda: styles.WideDropout(0.0))
        self.check(lambda m: setattr(m.drop_path, "drop_prob", 0.5), styles.WithDropPath)
        self.check(lambda m: setattr(m.dropout, "p", 0.5), styles.DropoutModule)
        self.check(lambda m: setattr(m.conv1, "padding_mode", "circular"), styles.Basic)

        def replicate(m: Any) -> None:
            m.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
            m.conv1.padding_mode = "replicate"

        self.check(replicate, styles.Basic)

    def test_child(self) -> None:
        self.check(lambda m: setattr(m, "relu", nn.LeakyReLU()), styles.Bottleneck)
        self.check(lambda m: setattr(m, "bn2", nn.Identity()), styles.Basic)
        self.check(lambda m: m.act2.append(nn.Tanh()), styles.HelperModules)

        def without_projection(m: Any) -> None:
            del m.shortcut
            m.conv1.stride = (1, 1)

        self.check(without_projection, styles.ActivatedProjection)

    def test_forward_on_the_object(self) -> None:
        def change(m: Any) -> None:
            m.conv1.forward = lambda x: torch.tanh(x)

        self.check(change, styles.Basic)

    def test_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, plain = pair(styles.FlaggedBasic)
        preact.fuse_(model)
        agree(model, plain, image())
        monkeypatch.setattr(styles, "DOUBLE", True)
        agree(model, plain, image())
        monkeypatch.setattr(styles.FlaggedBasic, "factor", 5)
        agree(model, plain, image())
        monkeypatch.setattr(styles.FlaggedBasic, "branch", lambda self, x: self.conv1(self.bn1(x)))
        agree(model, plain, image())
        monkeypatch.setattr(styles.FlaggedBasic, "forward", lambda self, x: self.branch(x).tanh())
        agree(model, plain, image())

    def test_frozen_norm(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        for m in (model, plain):
            m.bn1.eval()
            m.conv2.weight.requires_grad_(False)
        agree(model, plain, image())

    def test_dropout_fuses_in_eval_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, plain = pair(styles.WideDropout)
        report = preact.fuse_(model)
        assert fused_kinds(report) == (styles.PREFIX, styles.BN_RELU)
        for mode in (True, False, True):
            agree(model.train(mode), plain.train(mode), image())
        plans = len(model.__dict__["_preact_block"].plans)
        for mode in (True, False, True):
            model.train(mode)(image())
        assert len(model.__dict__["_preact_block"].plans) == plans

    def test_argument_kinds(self) -> None:
        model, plain = pair(styles.KeywordOnly)
        preact.fuse_(model)
        x, mask = image(), image() > 0
        for args, kwargs in (
            ((x,), {}), ((x, mask), {}), ((x,), {"mask": mask}), ((x,), {"scale": 2}),
            ((x, None, 1), {}), ((), {"x": x}), ((x, None, True), {}),
        ):  # fmt: skip
            torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))

    def test_list_and_tensor(self) -> None:
        model, plain = pair(styles.CallsListLayer)
        preact.fuse_(model)
        agree(model, plain, image())
        layer, x = model.layer, image()
        assert layer.__dict__["_preact_block"].misses == 0
        torch.testing.assert_close(layer((x, x)), plain.layer((x, x)))

    def test_something_new_at_every_call(self) -> None:
        model, _ = pair(styles.KeywordOnly)
        preact.fuse_(model)
        for scale in range(40):
            torch.testing.assert_close(model(image(), None, scale).shape, image().shape)
        state = model.__dict__["_preact_block"]
        assert len(state.plans) <= 8
        assert state.misses >= 35

    def test_wrong_input(self) -> None:
        model, plain = pair(styles.Basic)
        preact.fuse_(model)
        for bad in (torch.zeros(2, 8, 6).double(), torch.zeros(2, 3, 6, 6).double(), "x", None):
            errors = []
            for m in (model, plain):
                with pytest.raises(Exception) as caught:  # noqa: PT011
                    m(bad)
                errors.append(type(caught.value))
            assert errors[0] is errors[1]


class TestCompile:
    @pytest.mark.parametrize("name", ["activated_projection", "post_activation", "helper_modules"])
    def test_fullgraph(self, name: str) -> None:
        torch._dynamo.reset()
        model, plain = pair(styles.MATCHED[name].make)
        preact.fuse_(model)
        compiled: Any = torch.compile(
            model, fullgraph=True, backend="aot_eager" if name == "helper_modules" else "eager"
        )
        for mode in (True, False):
            model.train(mode)
            agree(compiled, plain.train(mode), image())

    def test_compiled_code_is_the_fused_one(self) -> None:
        torch._dynamo.reset()
        calls: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            calls.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        model = styles.WideDropout()
        preact.fuse_(model)
        with preact.use_backend("cpp"):
            torch.compile(model.eval(), fullgraph=True, backend=backend)(torch.randn(2, 8, 6, 6))
        assert not any("batch_norm" in call and "preact" not in call for call in calls)

    def test_attribute_changes(self) -> None:
        torch._dynamo.reset()
        model, plain = pair(lambda: styles.WideDropout(0.0))
        preact.fuse_(model)
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        agree(compiled, plain, image())
        model.p = plain.p = 1.0
        agree(compiled, plain, image())
