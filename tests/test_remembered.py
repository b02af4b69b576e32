"""Calls that were checked before take the short way, and nothing but such calls does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import preact
from preact import autograd, checks, plans, remembered, tuning, variables
from preact import functional as PF
from preact.backends import available

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)


@pytest.fixture
def checked(monkeypatch):
    """How many calls were checked."""
    counts = []
    check = checks.check_norm

    def counting(*arguments):
        counts.append(1)
        check(*arguments)

    monkeypatch.setattr(checks, "check_norm", counting)
    return counts


@pytest.fixture
def functions(monkeypatch):
    """Names of the autograd Functions that ran."""
    ran = []
    for function in (
        autograd.BatchNormReLU, autograd.BatchNormReLUConv2d, autograd.IdentityAdd,
        autograd.ResidualUnit,
    ):  # fmt: skip
        forward = function.forward

        def noting(*arguments, forward=forward, name=function.__name__):
            ran.append(name)
            return forward(*arguments)

        monkeypatch.setattr(function, "forward", staticmethod(noting))
    return ran


def prefix_and_input(**options):
    torch.manual_seed(0)
    module = preact.BatchNormReLUConv2d(8, 6, 3, padding=1, **options)
    return module, torch.randn(4, 8, 6, 6)


def unit_and_input(memory_format):
    """One that is no op of its own, and what it takes."""
    torch.manual_seed(0)
    unit = preact.PreActBasicBlock(8, 16, 2).to(memory_format=memory_format)
    return unit, torch.randn(4, 8, 6, 6).to(memory_format=memory_format)


CALLS = {
    "norm": lambda: (preact.BatchNormReLU2d(8), torch.randn(4, 8, 6, 6)),
    "prefix": prefix_and_input,
    "unit": lambda: (
        preact.PreActBasicBlock(16, 16).to(memory_format=torch.channels_last),
        torch.randn(4, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_(),
    ),
    "unit with a projection": lambda: unit_and_input(torch.channels_last),
    "contiguous unit": lambda: unit_and_input(torch.contiguous_format),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_is_not_checked_and_gives_the_same(name, training, checked):
    module, x = CALLS[name]()
    module.train(training)
    outputs = [module(x), module(x)]
    assert len(checked) == 1
    assert torch.equal(*outputs)


def test_one_that_differs_is_checked(checked):
    module, x = prefix_and_input()
    calls = [
        lambda: module(x),
        lambda: module(x[:3]),
        lambda: module(x.contiguous(memory_format=torch.channels_last)),
        lambda: module(x.double().float().requires_grad_()),
        lambda: module(x, torch.randn(4, 6, 6, 6)),
        lambda: module(x, torch.randn(4, 6, 1, 1)),
        lambda: module.eval()(x),
        lambda: module.norm.requires_grad_(False) and module(x),
        lambda: setattr(module.norm, "eps", 1e-3) or module(x),
        lambda: setattr(module.conv, "padding", (0, 0)) or module(x),
        lambda: setattr(module.conv, "bias", nn.Parameter(torch.zeros(6))) or module(x),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(checked) == count
    for count, context in enumerate((torch.no_grad, torch.inference_mode), len(calls) + 1):
        with context():
            module(x)
        assert len(checked) == min(count, len(calls) + 1), "both are without gradients"
    for context in (preact.use_plan("A"), torch.autocast("cpu", torch.bfloat16)):
        before = len(checked)
        with context:
            module(x)
        assert len(checked) == before + 1


@pytest.mark.parametrize("grad", [True, False])
def test_what_was_remembered_still_refuses(grad):
    module, x = prefix_and_input(bias=True)
    residual = torch.randn(4, 6, 6, 6)
    with torch.set_grad_enabled(grad):
        module(x, residual)
        before = module.norm.running_mean.clone(), module.norm.running_var.clone()
        for owner, name, bad, error in [
            (module.norm.weight, "data", torch.ones(5), RuntimeError),
            (module.norm.bias, "data", torch.ones(8).double(), RuntimeError),
            (module.norm, "eps", 0.0, ValueError),
            (module.conv.weight, "data", torch.ones(6, 7, 3, 3), RuntimeError),
            (module.conv.weight, "data", torch.ones(6, 8, 3, 3, device="meta"), RuntimeError),
            (module.conv.bias, "data", torch.ones(7), RuntimeError),
        ]:
            saved = getattr(owner, name)
            if isinstance(bad, torch.Tensor) and bad.device.type == "meta":
                module.conv.weight = nn.Parameter(bad)
            else:
                setattr(owner, name, bad)
            with pytest.raises(error):
                module(x, residual)
            if isinstance(bad, torch.Tensor) and bad.device.type == "meta":
                module.conv.weight = owner
            else:
                setattr(owner, name, saved)
        with pytest.raises(RuntimeError, match="residual"):
            module(x, residual[:3])
        with pytest.raises(ValueError, match="more than 1 value"):
            module(x[:1, :, :1, :1])
    for running, kept in zip(
        (module.norm.running_mean, module.norm.running_var), before, strict=True
    ):
        assert torch.equal(running, kept)
    module(x, residual)


def layers_and_projection():
    """Of a unit with biases, as the functions take them."""
    torch.manual_seed(0)
    norms = [
        PF.Norm(torch.zeros(c), torch.ones(c), torch.rand(c), torch.rand(c), True, 0.1, 1e-5)
        for c in (8, 16)
    ]
    convs = [
        PF.Conv(torch.randn(16, c, k, k) * 0.1, torch.rand(16), 1, k // 2, 1, 1)
        for c, k in ((8, 3), (16, 3), (8, 1))
    ]
    return list(zip(norms, convs[:2], strict=True)), convs[2]


@pytest.mark.parametrize("training", [True, False])
def test_a_remembered_unit_still_refuses(training):
    (first, (norm, conv)), projection = layers_and_projection()
    norm, first = norm._replace(training=training), (first[0]._replace(training=training), first[1])
    x = torch.randn(4, 8, 6, 6)
    PF.residual_unit(x, [first, (norm, conv)], projection)
    vectors = [vector for of in (first[0], norm) for vector in of[:2]]
    before = [vector.clone() for vector in vectors]
    for wrong, of_shortcut, error in [
        ((norm._replace(momentum=None), conv), projection, TypeError),
        ((norm._replace(eps=0.0), conv), projection, ValueError),
        ((norm._replace(weight=torch.ones(5)), conv), projection, RuntimeError),
        ((norm, conv._replace(bias=torch.ones(5))), projection, RuntimeError),
        ((norm, conv._replace(weight=torch.ones(16, 5, 3, 3))), projection, RuntimeError),
        ((norm, conv), projection._replace(weight=torch.ones(16, 9, 1, 1)), RuntimeError),
    ]:
        with pytest.raises(error):
            PF.residual_unit(x, [first, wrong], of_shortcut)
    assert all(map(torch.equal, vectors, before))


def test_units_that_differ_are_told_apart(checked):
    (first, second), projection = layers_and_projection()
    wide = torch.randn(4, 16, 6, 6)
    calls = [
        lambda: PF.residual_unit(wide, [second, second]),
        lambda: PF.residual_unit(wide, [second], second[1]),
        lambda: PF.residual_unit(wide, [second, second], return_statistics=True),
        lambda: PF.residual_unit(wide, [second, second], save_activation=True),
        lambda: PF.residual_unit(wide[:, :8].contiguous(), [first, second], projection),
    ]
    for call in calls:
        before = len(checked)
        results = [call() for _ in range(2)]
        assert len(checked) == before + 1
        assert torch.equal(results[0][0], results[1][0])
        assert (results[1][1] is not None) is (call is calls[2])


def test_while_measuring_is_paused_nothing_is_remembered(checked):
    unit, x = unit_and_input(torch.channels_last)
    with tuning.paused():
        unit(x)
        unit(x)
    assert len(checked) == 2
    assert not remembered._calls


def test_no_function_where_nobody_asks_for_a_gradient(functions):
    module, x = prefix_and_input()
    unit, narrow = unit_and_input(torch.channels_last)
    norm = preact.BatchNormReLU2d(8)
    frozen = prefix_and_input()[0].requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            module(x), norm(x)
            PF.identity_add(x, x, return_statistics=True)
            unit(narrow)
        with torch.inference_mode():
            module(x), unit(narrow)
        assert not frozen(x).requires_grad
        PF.identity_add(x, x, return_statistics=True)
    assert functions == []
    frozen(x.clone().requires_grad_()).sum().backward()
    module(x), norm(x)
    PF.identity_add(x, x.clone().requires_grad_(), return_statistics=True)
    unit(narrow)
    assert functions == [
        "BatchNormReLUConv2d", "BatchNormReLUConv2d", "BatchNormReLU", "IdentityAdd",
        "ResidualUnit",
    ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_the_same_without_gradients_as_with(training):
    results = []
    for grad in (True, False):
        module, x = prefix_and_input(bias=True)
        module.train(training)
        with torch.set_grad_enabled(grad):
            output = module(x, torch.ones(4, 6, 6, 6))
        results.append([output.detach(), *module.buffers()])
    for with_them, without in zip(*results, strict=True):
        assert torch.equal(with_them, without)


def test_forward_mode_is_refused_and_never_silently_wrong():
    """A tangent that an op without a formula dropped would be a gradient of zero."""
    module, x = prefix_and_input()
    module.eval().requires_grad_(False)
    module(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            module(dual)


def test_a_stride_given_as_a_list(checked):
    module, x = prefix_and_input()
    norm = module.norm.eval()
    vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    outputs = [
        PF.batch_norm_relu_conv2d(x, *vectors, module.conv.weight, None, stride)
        for stride in ([2, 2], [2, 2], (2, 2))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_what_is_kept_stays_bounded(monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 3)
    module, x = prefix_and_input()
    for batch in range(1, 5):
        module(x[:batch])
    assert len(remembered._calls) <= 3


@pytest.mark.parametrize("variable", variables._NAMES)
def test_a_variable_set_meanwhile_holds_for_the_next_call(variable, checked, monkeypatch):
    module, x = prefix_and_input()
    values = {
        "PREACT_BACKEND": "reference", "PREACT_PLAN": "A", "PREACT_TUNE": "off",
        "PREACT_SMALL_MAP": "5",
    }  # fmt: skip
    monkeypatch.delenv(variable, raising=False)
    module(x)
    monkeypatch.setenv(variable, values[variable])
    module(x)
    assert len(checked) == 2
    monkeypatch.setenv(variable, "nonsense")
    mean = module.norm.running_mean.clone()
    with pytest.raises(ValueError, match=variable):
        module(x)
    assert torch.equal(module.norm.running_mean, mean)
    monkeypatch.delenv(variable)
    checked.clear()
    module(x)
    assert not checked, "as at first"


@pytest.fixture
def backwards(monkeypatch):
    """Names of the works that were asked about."""
    asked = []
    fuses = plans.fuses_convolution

    def noting(backend, input, weight, geometry, work, dtype=None):
        asked.append(work)
        return fuses(backend, input, weight, geometry, work, dtype)

    monkeypatch.setattr(plans, "fuses_convolution", noting)
    return asked


@pytest.mark.parametrize("name", ["prefix", "unit with a projection"])
def test_a_backward_is_decided_once_for_each_plan(name, backwards):
    module, x = CALLS[name]()
    gradients = []

    def step(plan):
        output = module(x).square().sum()
        with preact.use_plan(plan):
            gradients.append(torch.autograd.grad(output, list(module.parameters())))

    convolutions = sum(isinstance(m, nn.Conv2d) for m in module.modules())
    for plan, decided in (("auto", 1), ("auto", 1), ("B", 2), ("auto", 2), ("B", 2)):
        step(plan)
        assert backwards.count("backward") == decided * convolutions
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-4)

    output = module(x[:2]).sum()
    with tuning.paused():
        output.backward()
    for decided in (4, 4):
        module(x[:2]).sum().backward()
        assert backwards.count("backward") == decided * convolutions, "kept, but for the paused one"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class DoubledConv2d(nn.Conv2d):
    @property
    def weight(self):
        return 2 * nn.Module.__getattr__(self, "weight")


def test_a_property_of_a_class_of_ones_own_is_asked():
    module, x = prefix_and_input()
    conv = DoubledConv2d(8, 6, 3, padding=1)
    # The constructor initialised what the property returned, and left the parameter as it was.
    nn.init.normal_(next(conv.parameters()))
    module.conv = conv
    expected = module.conv(torch.relu(module.eval().norm(x)))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("layer", ["norm", "conv"])
def test_a_parametrized_weight_is_taken_as_it_is_computed(layer):
    module, x = prefix_and_input()
    nn.utils.parametrize.register_parametrization(getattr(module, layer), "weight", Doubled())
    expected = module.conv(torch.relu(module.eval().norm(x)))
    torch.testing.assert_close(module(x), expected)
