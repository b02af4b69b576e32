"""Every bad argument: eager's exception type, its name in the message, running statistics kept."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import preact
from preact import functional as PF

X = torch.linspace(-1, 1, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)


def arguments(**changes):
    values = {
        "input": X,
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "training": True,
        "eps": 1e-5,
        "conv_weight": torch.ones(3, 4, 3, 3),
        "conv_bias": None,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 1,
        "residual": None,
    }
    return {**values, **changes}


def eager(input, conv_weight, conv_bias, stride, padding, dilation, groups, residual, **norm):
    activation = F.relu(F.batch_norm(input, **norm))
    output = F.conv2d(activation, conv_weight, conv_bias, stride, padding, dilation, groups)
    return output if residual is None else output + residual


META = "meta"
BAD = {
    "integer input": ("input", {"input": X.int()}),
    "input of rank 1": ("input", {"input": X.flatten()}),
    "input of rank 2": ("input", {"input": X.reshape(50, 4)}),
    "input of rank 5": ("input", {"input": X[:, :, None]}),
    "one value per channel": ("input", {"input": X[:1, :, :1, :1]}),
    "short running_mean": ("running_mean", {"running_mean": torch.zeros(3)}),
    "short running_var": ("running_var", {"running_var": torch.ones(3)}),
    "short weight": ("weight", {"weight": torch.ones(3)}),
    "long bias": ("bias", {"bias": torch.zeros(5)}),
    "double weight": ("weight", {"weight": torch.ones(4).double()}),
    "half bias": ("bias", {"bias": torch.zeros(4).half()}),
    "eps of zero": ("eps", {"eps": 0.0}),
    "no running statistics in evaluation": (
        "running_mean",
        {"running_mean": None, "running_var": None, "training": False},
    ),
    "running_mean alone": ("running_var", {"running_var": None}),
    "no momentum": ("momentum", {"momentum": None}),
    "three strides": ("stride", {"stride": (1, 1, 1)}),
    "three paddings": ("padding", {"padding": (1, 1, 1)}),
    "no dilation": ("dilation", {"dilation": ()}),
    "conv_weight of wrong channels": ("conv_weight", {"conv_weight": torch.ones(3, 5, 3, 3)}),
    "groups that do not divide": ("groups", {"groups": 3}),
    "conv_weight of rank 3": ("conv_weight", {"conv_weight": torch.ones(3, 4, 3)}),
    "double conv_weight": ("conv_weight", {"conv_weight": torch.ones(3, 4, 3, 3).double()}),
    "short conv_bias": ("conv_bias", {"conv_bias": torch.zeros(2)}),
    "residual that does not broadcast": ("residual", {"residual": torch.ones(2, 3, 4, 5)}),
    "kernel larger than the image": ("conv_weight", {"conv_weight": torch.ones(3, 4, 9, 9)}),
    "weight on another device": ("weight", {"weight": torch.ones(4, device=META)}),
}


def raised(function, values):
    """The exception of a call, and whether the running statistics are as they were."""
    copies = {
        name: value.clone() if name.startswith("running") and value is not None else value
        for name, value in values.items()
    }
    try:
        function(**copies)
    except Exception as error:
        kept = all(
            values[name] is None or torch.equal(copies[name], values[name])
            for name in ("running_mean", "running_var")
        )
        return error, kept
    return None, True


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case, backend):
    name, changes = BAD[case]
    values = arguments(**changes)
    expected, _ = raised(eager, values)
    with preact.use_backend(backend):
        error, kept = raised(PF.batch_norm_relu_conv2d, values)
    assert expected is not None, "eager accepts this"
    assert error is not None, f"eager raises {expected!r}"
    assert isinstance(error, type(expected)) or isinstance(expected, type(error)), repr(expected)
    assert re.search(name, str(error)), str(error)
    assert kept, "running statistics changed"


def test_inner_layer_of_a_unit_is_checked_before_anything_runs():
    block = preact.PreActBasicBlock(4, 4)
    block.conv2 = nn.Conv2d(5, 4, 3)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for backend in ("cpp", "reference"):
        with preact.use_backend(backend), pytest.raises(RuntimeError, match="conv_weight"):
            block(X)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "module",
    [
        preact.BatchNormReLU2d(4),
        preact.BatchNormReLUConv2d(4, 3, 1),
        preact.PreActBasicBlock(4, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_refuse_what_batchnorm2d_refuses(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for bad, exception in [
        (X[0], ValueError),
        (X[:1, :, :1, :1], ValueError),
        (X[:, :3], RuntimeError),
    ]:
        with pytest.raises(exception):
            nn.BatchNorm2d(4)(bad)
        with pytest.raises(exception):
            module(bad)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_of_another_shape():
    with pytest.raises(RuntimeError, match="statistics"):
        PF.batch_norm_relu(X, None, None, training=True, statistics=(torch.zeros(3), torch.ones(3)))


def test_empty_batch_is_eagers():
    values = arguments(input=X[:0], training=False)
    torch.testing.assert_close(PF.batch_norm_relu_conv2d(**values), eager(**values))
    training = arguments(input=X[:0])
    expected, _ = raised(eager, training)
    error, _ = raised(PF.batch_norm_relu_conv2d, training)
    assert type(error) is type(expected)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_other_ranks_run_as_eager(rank):
    x = torch.randn(3, 4, *([2] * (rank - 2)))
    torch.testing.assert_close(
        PF.batch_norm_relu(x, None, None, training=True),
        F.relu(F.batch_norm(x, None, None, training=True)),
    )


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"), preact.use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="stride_on"):
        preact.PreActBottleneck(16, 4, stride_on="5x5")
