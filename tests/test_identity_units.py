"""Identity units' own ops: the same results as the ops one by one, and when they run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import preact
from preact import reference_units
from preact.backends import cpp

from .tolerances import Runs, seeds

OPS = torch.ops.preact

needs_native = pytest.mark.skipif(bool(cpp.why_not("cpu")), reason=cpp.why_not("cpu"))


class Calls(TorchDispatchMode):
    """Names of this package's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "preact":
            self.names.append(func._schema.name.removeprefix("preact::"))
        return func(*args, **(kwargs or {}))


BASIC = ((16, 24, 3), (24, 16, 3))
BOTTLENECK = ((32, 8, 1), (8, 8, 3), (8, 32, 1))
POINTWISE = ((48, 48, 1),)
WIDE_BOTTLENECK = ((80, 72, 1), (72, 72, 3), (72, 80, 1))


def operands(
    dtype=torch.float32, weight_dtype=None, affine=True, own=True, units=1, layers=BASIC, batch=4,
    seed=0,
):  # fmt: skip
    """Arguments of the forward for units of ``layers``: channels, outputs, size of the kernel."""
    torch.manual_seed(seed)
    x = torch.randn(batch, layers[0][0], 6, 7).to(dtype).to(memory_format=torch.channels_last)
    mean, var = OPS.batch_norm_stats(x)
    parameters, geometries = [], []
    for c, out, size in layers * units:
        known = (None, None) if own else (torch.randn(c), torch.rand(c) + 0.5)
        parameters += known if parameters else (mean, var)
        parameters += (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
        weight = torch.randn(out, c, size, size) / (c * size * size) ** 0.5
        parameters.append(weight.to(weight_dtype or dtype))
        geometries += [1, 1, size // 2, size // 2, 1, 1, 1]
    eps = [(1e-5, 1e-3)[index % 2] for index in range(len(layers) * units)]
    return x, parameters, eps, geometries, len(layers)


def backward_operands(**options):
    x, parameters, eps, geometries, depth = operands(**options)
    found = reference_units.residual_units(x, parameters, eps, geometries, depth)
    inputs, own = [x], options.get("own", True)
    for index in range(1, len(eps)):
        inner, *statistics = found[3 * index : 3 * index + 3]
        inputs.append(inner)
        if own:
            parameters[5 * index : 5 * index + 2] = statistics
    return torch.randn_like(x), inputs, parameters, eps, [int(own)] * len(eps), geometries, depth


CASES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "plain": {"affine": False},
    "evaluation": {"own": False},
    "two units": {"units": 2},
    "two units, autocast": {"units": 2, "dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "two units, evaluation": {"units": 2, "own": False},
    # Of more pixels than a block has, the last block not whole.
    "bottlenecks": {"units": 3, "layers": BOTTLENECK, "batch": 15},
    "bottlenecks, plain": {"units": 2, "layers": BOTTLENECK, "affine": False},
    "bottlenecks, evaluation": {"units": 2, "layers": BOTTLENECK, "own": False},
    "bottlenecks, bfloat16": {
        "units": 3, "layers": BOTTLENECK, "batch": 15, "dtype": torch.bfloat16,
    },
    "pointwise": {"units": 4, "layers": POINTWISE},
    "pointwise, bfloat16": {
        "units": 3, "layers": POINTWISE, "batch": 15, "dtype": torch.bfloat16,
    },
    "wide bottlenecks": {"units": 2, "layers": WIDE_BOTTLENECK},
    "wide bottlenecks, bfloat16": {
        "units": 2, "layers": WIDE_BOTTLENECK, "dtype": torch.bfloat16,
    },
}  # fmt: skip


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return [doubled(v) for v in value] if isinstance(value, list) else value


def strides(tensor):
    """Those that count."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@needs_native
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", ["residual_units", "residual_units_backward"])
def test_ops_equal_the_formulas(name, case):
    make = operands if name == "residual_units" else backward_operands
    options, runs = CASES[case], Runs()
    for seed in seeds(options.get("dtype", torch.float32)):
        arguments = make(**options, seed=seed)
        found = getattr(OPS, name)(*arguments)
        eager = getattr(reference_units, name)(*arguments)
        exact = getattr(reference_units, name)(*doubled(list(arguments)))
        terms = max(float(result.abs().max()) for result in exact)
        for index, (ours, theirs, reference) in enumerate(zip(found, eager, exact, strict=True)):
            assert ours.dtype == theirs.dtype
            assert strides(ours) == strides(theirs)
            runs.add(f"{name} {index}", ours, theirs, reference, terms)
    runs.assert_as_good_as_eager()


@pytest.mark.parametrize("layers", [BASIC, BOTTLENECK, WIDE_BOTTLENECK])
@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("dense", [True, False])
def test_the_gradient_that_comes_in_is_left_as_it_is(units, layers, dense):
    grad_output, *others = backward_operands(units=units, layers=layers)
    if not dense:
        grad_output = grad_output.contiguous()
    before = grad_output.clone()
    first = OPS.residual_units_backward(grad_output, *others)
    assert torch.equal(grad_output, before)
    for ours, again in zip(first, OPS.residual_units_backward(grad_output, *others), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("name", list(preact.ops.COMPOSED))
def test_opcheck(name):
    arguments = {
        "residual_units": operands(),
        "residual_units_backward": backward_operands(),
        "update_running_stats": ([torch.zeros(3), torch.ones(3)], [torch.randn(3)] * 2, [0.1], 8),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics(dtype):
    running = [torch.randn(5).to(dtype), torch.rand(5).to(dtype)] * 2
    batch = [torch.randn(5), torch.rand(5), torch.randn(5), torch.rand(5)]
    expected = [vector.clone() for vector in running]
    running = [vector.clone() for vector in running]
    reference_units.update_running_stats(expected, batch, [0.1, 1.0], 7)
    OPS.update_running_stats(running, batch, [0.1, 1.0], 7)
    for ours, theirs in zip(running, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_at_momentum_1():
    """The first batch of a cumulative average: a small variance replaces the initial 1 whole."""
    running = [torch.zeros(3), torch.ones(3)]
    batch = [torch.randn(3) * 1e-6, torch.rand(3) * 1e-9]
    OPS.update_running_stats(running, batch, [1.0], 9)
    torch.testing.assert_close(running[0], batch[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(running[1], batch[1] * 9 / 8, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(3)], [torch.zeros(3)], [0.1], 4), "two vectors for each momentum"),
        (([torch.zeros(3)] * 2, [torch.zeros(4)] * 2, [0.1], 4), "of the same size"),
        (([torch.zeros(3)] * 2, [torch.zeros(3)] * 2, [0.1], 1), "at least 2"),
    ],
)
@needs_native
def test_running_statistics_refuse(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.update_running_stats(*arguments)


def unit_and_input(**options):
    torch.manual_seed(1)
    unit = preact.PreActBasicBlock(16, 16, **options).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
    return unit, x.requires_grad_()


def ran(unit, x, backward=True):
    with Calls() as calls:
        output = unit(x)
        if backward:
            output.sum().backward()
    return calls.names


@needs_native
class TestWhenItRuns:
    def test_in_training_and_evaluation(self):
        unit, x = unit_and_input()
        for _ in range(2):  # checked, then remembered
            assert ran(unit, x).count("residual_units") == 1
        unit.eval()
        with torch.no_grad():
            assert "residual_units" in ran(unit, x, backward=False)

    def test_under_autocast(self):
        unit, x = unit_and_input()
        x = x.detach().bfloat16().requires_grad_()
        if cpp.cpu_capability() == "baseline":
            pytest.skip("this processor convolves bfloat16 in the library")
        with torch.autocast("cpu", torch.bfloat16):
            names = ran(unit, x)
        assert {"residual_units", "residual_units_backward"} <= set(names)
        assert unit.conv1.weight.grad.dtype == torch.float32

    @pytest.mark.parametrize("what", ["frozen", "contiguous", "bias", "plan D", "saved"])
    def test_not_where_it_cannot(self, what):
        unit, x = unit_and_input(save_activation=what == "saved")
        ran(preact.PreActBasicBlock(16, 16).to(memory_format=torch.channels_last), x)  # remembered
        if what == "frozen":
            unit.conv1.weight.requires_grad_(False)
        if what == "contiguous":
            x = x.detach().contiguous().requires_grad_()
        if what == "bias":
            unit.conv1.bias = torch.nn.Parameter(torch.zeros(16))
        with preact.use_plan("D" if what == "plan D" else "auto"):
            assert "residual_units" not in ran(unit, x)

    def test_what_was_remembered_still_refuses(self):
        unit, x = unit_and_input()
        ran(unit, x)
        before = unit.bn2.running_mean.clone()
        for break_it in (
            lambda: setattr(unit.bn2.weight, "data", torch.ones(5)),
            lambda: setattr(unit.conv2.weight, "data", unit.conv2.weight.data.double()),
            lambda: setattr(unit.bn2, "eps", 0.0),
        ):
            saved = unit.bn2.weight.data, unit.conv2.weight.data, unit.bn2.eps
            break_it()
            with pytest.raises((RuntimeError, ValueError)):
                unit(x)
            unit.bn2.weight.data, unit.conv2.weight.data, unit.bn2.eps = saved
        torch.testing.assert_close(unit.bn2.running_mean, before, rtol=0, atol=0)

    def test_running_statistics_keep_count_of_their_versions(self):
        """Autograd notices that what another op saved was overwritten."""
        unit, x = unit_and_input()
        product = unit.bn1.running_mean * torch.ones(1, requires_grad=True)
        unit.train()
        unit(x.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_statistics_handed_on_are_checked(self):
        unit, x = unit_and_input()
        unit(x)
        with pytest.raises(RuntimeError, match="mean"):
            unit(x, (torch.zeros(3), torch.ones(3)))


def stage_and_input(layers="basic", **options):
    torch.manual_seed(2)
    channels, inner = {"basic": (16, 16), "bottleneck": (32, 8)}[layers]
    units = [
        preact.models.ResidualUnit(channels, inner, layers=layers, **options) for _ in range(3)
    ]
    stage = preact.models.PreActStage(*units)
    x = torch.randn(15, channels, 8, 8).to(memory_format=torch.channels_last)
    return stage.to(memory_format=torch.channels_last), x.requires_grad_()


def results(stage, x, **options):
    """Everything one step leaves behind."""
    stage.zero_grad()
    x.grad = None
    output, statistics = stage(x, **options)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: p.grad.clone() for name, p in stage.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in stage.named_buffers()}
    found |= {"output": output.detach(), "grad_input": x.grad}
    return found | dict(zip(("mean", "var"), statistics or (), strict=False))


@needs_native
class TestStage:
    @pytest.mark.parametrize("layers", ["basic", "bottleneck"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_one_op_gives_what_one_by_one_gives(self, training, layers):
        stage, x = stage_and_input(layers)
        stage.train(training)
        state = {name: value.clone() for name, value in stage.state_dict().items()}
        steps = []
        for expected in (3, 1, 1):  # unit by unit the first time
            stage.load_state_dict(state)
            with Calls() as calls:
                steps.append(results(stage, x))
            for name in ("residual_units", "residual_units_backward"):
                assert calls.names.count(name) == expected
        for step in steps[1:]:
            assert step.keys() == steps[0].keys()
            for name, value in step.items():
                assert torch.equal(value, steps[0][name]), name
        assert ("mean" in steps[0]) == training

    @pytest.mark.parametrize("before", [0, 2], ids=["first call", "remembered"])
    def test_units_before_one_that_raises_have_counted_the_batch(self, before):
        stage, x = stage_and_input()
        one_by_one = copy.deepcopy(stage)
        for _ in range(before):
            stage(x)
        one_by_one.load_state_dict(stage.state_dict())
        for model in (stage, one_by_one):
            model[2].conv2 = torch.nn.Conv2d(24, 16, 3, padding=1, bias=False)
        with pytest.raises(RuntimeError, match="24 channels"):
            stage(x)
        with pytest.raises(RuntimeError, match="24 channels"):
            torch.nn.Sequential(*one_by_one)(x)
        for (name, found), expected in zip(
            stage.named_buffers(), one_by_one.buffers(), strict=True
        ):
            torch.testing.assert_close(found, expected, msg=name)
        counted = [int(unit.bn1.num_batches_tracked) for unit in stage]
        assert counted == [before + 1, before + 1, before]

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_without_gradients_nothing_is_held_between_units(self, training):
        stage, x = stage_and_input()
        stage.train(training)
        state = {name: value.clone() for name, value in stage.state_dict().items()}
        for _ in range(2):  # so that the whole stage is remembered, with gradients
            stage.load_state_dict(state)
            output, statistics = stage(x)
        expected = {name: buffer.clone() for name, buffer in stage.named_buffers()}
        for _ in range(3):
            stage.load_state_dict(state)
            with torch.no_grad(), Calls() as calls:
                found, own = stage(x.detach())
            assert calls.names.count("residual_units") == 3
            assert torch.equal(found, output)
            for name, buffer in stage.named_buffers():
                assert torch.equal(buffer, expected[name]), name
            for ours, theirs in zip(own or (), statistics or (), strict=True):
                assert torch.equal(ours, theirs)

    def test_double_backward(self):
        stage, x = stage_and_input()
        x = x.detach()[:2, :, :4, :4].contiguous(memory_format=torch.channels_last)
        stage.eval()
        gradients = []
        for _ in range(2):
            y = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(stage(y)[0].square().sum(), y, create_graph=True)
            gradients.append(torch.autograd.grad(grad.square().sum(), y)[0])
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_a_unit_that_is_watched_is_called(self):
        stage, x = stage_and_input()
        results(stage, x)
        seen = []
        stage[1].register_forward_hook(lambda *_: seen.append("forward"))
        stage[1].register_full_backward_hook(lambda *_: seen.append("backward"))
        results(stage, x)
        assert seen == ["forward", "backward"]
        stage[2].forward = lambda x, statistics, return_statistics: (x * 0, None)
        assert not stage(x)[0].any()

    def test_other_units_keep_their_place(self):
        """Between identity units stands one that saves its activations, and one frozen in part."""
        stage, x = stage_and_input()
        stage[1].save_activation = True
        stage[2].convs[0].weight.requires_grad_(False)
        for _ in range(2):
            output = stage(x)[0]
        y, statistics = x, None
        for unit in stage:
            y, statistics = unit(y, statistics, return_statistics=True)
        torch.testing.assert_close(output, y, rtol=0, atol=0)

    def test_what_was_remembered_still_refuses(self):
        stage, x = stage_and_input()
        for _ in range(2):
            stage(x)
        stage[2].bn2.weight.data = torch.ones(5)
        before = stage[2].bn1.running_mean.clone()
        with pytest.raises(RuntimeError, match="weight"):
            stage(x)
        assert torch.equal(stage[2].bn1.running_mean, before)
