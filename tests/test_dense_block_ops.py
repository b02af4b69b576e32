"""The dense block's own ops against their formulas, and when a block is looked at again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import preact
from preact import dense, reference, reference_dense, remembered
from preact.backends import available
from preact.functional import Conv, Norm

from .tolerances import Runs, magnitude, seeds

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

OPS = torch.ops.preact
FIRST, BOTTLENECK, GROWTH, LAYERS = 24, 32, 16, 3
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def operands(dtype, weight_dtype, layout, own, affine=True, seed=0):
    """Arguments of the forward; ``own`` says of both norms whether they take the batch's values."""
    torch.manual_seed(seed)
    accumulate = reference.accumulate_dtype(dtype)
    x = torch.randn(3, FIRST, 9, 7).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    parameters: list[Tensor | None] = []
    numbers: list[int] = []
    for index in range(LAYERS):
        sizes = ((FIRST + index * GROWTH, BOTTLENECK, 1), (BOTTLENECK, GROWTH, 3))
        for (inputs, outputs, kernel), batch in zip(sizes, own, strict=True):
            known = torch.randn(inputs), torch.rand(inputs) + 0.5
            scales = torch.rand(inputs) + 0.5, torch.randn(inputs)
            parameters += (None, None) if batch else [v.to(accumulate) for v in known]
            parameters += [v.to(accumulate) for v in scales] if affine else (None, None)
            weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
            parameters.append(weight.to(dtype).to(weight_dtype))
            numbers += [1, 1, kernel // 2, kernel // 2, 1, 1, 1]
    return x, parameters, [1e-5] * 2 * LAYERS, numbers


def double(value):
    if isinstance(value, list):
        return [double(v) for v in value]
    return value.double() if isinstance(value, Tensor) else value


CASES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),
}


def run_ops(given, layout, runs):
    x, *rest = given
    found = OPS.dense_block(*given, True)
    eager = reference_dense.dense_block(*given, True)
    exact = reference_dense.dense_block(*map(double, given), True)
    names = ["features", "mean", "var", *(f"inner {i}" for i in range(2 * LAYERS))]
    names += [f"bottleneck {i}" for i in range(LAYERS)]
    for name, result, plain, wanted in zip(names, found, eager, exact, strict=True):
        assert result.dtype == plain.dtype
        assert result.stride() == plain.stride()
        runs.add(name, result, plain, wanted, magnitude(wanted))
    assert len(OPS.dense_block(*given, False)) == len(found) - LAYERS

    grad = torch.randn(found[0].shape).to(x).contiguous(memory_format=LAYOUTS[layout])
    arguments = (grad, eager, *rest, True)
    found = OPS.dense_block_backward(*arguments)
    plain = reference_dense.dense_block_backward(*arguments)
    wanted = reference_dense.dense_block_backward(*map(double, arguments))
    terms = (magnitude(grad.double()) * grad[:, 0].numel()) ** 0.5
    for index, (result, a, b) in enumerate(zip(found, plain, wanted, strict=True)):
        assert result.dtype == a.dtype
        runs.add(f"gradient {index}", result, a, b, magnitude(b) + terms)
    assert found[0].stride() == x.stride()
    without = OPS.dense_block_backward(*arguments[:-1], False)
    assert without[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(without[1:], found[1:], strict=True))


@pytest.mark.parametrize("own", [(True, True), (False, False), (False, True)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_ops_equal_their_formulas(case, layout, own):
    dtypes = CASES[case]
    for affine in (True, False):
        runs = Runs()
        for seed in seeds(dtypes[0]):
            run_ops(operands(*dtypes, layout, own, affine, seed), layout, runs)
        runs.assert_as_good_as_eager()


def test_gradients_that_are_no_maps_of_their_own():
    given = operands(torch.float32, torch.float32, "channels_last", (True, True))
    found = OPS.dense_block(*given, True)
    expanded = torch.tensor(0.5).expand(found[0].shape)
    results = [
        OPS.dense_block_backward(grad, found, *given[1:], True)
        for grad in (expanded, expanded.contiguous(memory_format=torch.channels_last))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    given = operands(torch.float32, torch.float32, "channels_last", (True, False))
    torch.library.opcheck(OPS.dense_block.default, (*given, True))
    found = OPS.dense_block(*given, True)
    backward = (torch.randn_like(found[0]), found, *given[1:], True)
    torch.library.opcheck(OPS.dense_block_backward.default, backward)


def test_results_do_not_depend_on_the_number_of_threads():
    given = operands(torch.float32, torch.float32, "channels_last", (True, True))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found = OPS.dense_block(*given, True)
            results.append(found + OPS.dense_block_backward(found[0], found, *given[1:], True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("parameters", lambda x, p, e, n: (x, p[:-1], e, n)),
        ("geometries", lambda x, p, e, n: (x, p, e, n[:-1])),
        ("eps", lambda x, p, e, n: (x, p[:-5], e[:-1], n[:-7])),
    ],
)
def test_an_op_names_the_argument_it_refuses(message, change):
    given = operands(torch.float32, torch.float32, "channels_last", (True, True))
    with pytest.raises(RuntimeError, match=message):
        OPS.dense_block(*change(*given), True)


def test_a_decision_is_remembered_until_something_changes(monkeypatch):
    monkeypatch.setattr(remembered, "_calls", {})
    asked = []
    decide = dense._decide
    monkeypatch.setattr(dense, "_decide", lambda *a: asked.append(a) or decide(*a))
    x, parameters, *_ = operands(torch.float32, torch.float32, "channels_last", (True, True))
    p = [None if v is None else v.requires_grad_() for v in parameters[:10]]

    def layer(training=True, padding=1):
        first = Norm(torch.zeros(FIRST), torch.ones(FIRST), *p[2:4], training)
        second = Norm(None, None, *p[7:9], True)
        return [(first, Conv(p[4]), second, Conv(p[9], None, 1, padding))]

    for _ in range(3):
        assert dense.is_fusible(x, layer())
    assert len(asked) == 1
    assert dense.is_fusible(x, layer(training=False))
    assert not dense.is_fusible(x, layer(padding=0))
    assert not dense.is_fusible(x.contiguous(), layer())
    with torch.no_grad():
        assert dense.is_fusible(x[:1].contiguous(memory_format=torch.channels_last), layer())
    with preact.use_plan("A"):
        assert not dense.is_fusible(x, layer())
    p[4].requires_grad_(False)
    assert not dense.is_fusible(x, layer())
    assert len(asked) == 7
    p[4].requires_grad_()
    with pytest.raises(ValueError, match="eps"):
        dense.is_fusible(x, [(*layer()[0][:2], layer()[0][2]._replace(eps=0.0), layer()[0][3])])
