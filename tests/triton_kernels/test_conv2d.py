"""The convolution kernels against the formulas of ``reference`` in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from preact import reference, tuning
from preact.triton_kernels._prologue import Config

from ..evidence import interpreter, ptx
from ..tolerances import assert_as_good_as_eager

OPS = torch.ops.preact_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Config(16, 16, 16, 4, 2)
"""Small tiles, so that small maps have several, and some that the map does not fill."""


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


CASES = {
    "3x3": Case((2, 20, 7, 6), 17, (3, 3), padding=(1, 1)),
    "1x1": Case((3, 33, 4, 5), 18, (1, 1)),
    "3x3 stride 2": Case((2, 8, 9, 6), 5, (3, 3), (2, 2), (1, 1)),
    "1x1 stride 2": Case((1, 6, 5, 8), 7, (1, 1), (2, 2)),
    "groups": Case((2, 12, 5, 5), 6, (3, 3), (1, 1), (1, 1), groups=3),
    "depthwise, dilated": Case((1, 4, 7, 8), 4, (3, 3), (1, 1), (2, 2), (2, 2), 4),
    "uneven": Case((1, 5, 8, 7), 3, (2, 3), (1, 3), (0, 4), (2, 1)),
    "stride and dilation share a factor": Case((1, 4, 9, 9), 3, (3, 2), (4, 2), (3, 2), (2, 2)),
    "kernel smaller than stride": Case((2, 4, 7, 7), 4, (2, 1), (3, 2), (1, 0)),
}


class Prefix(NamedTuple):
    """What the ops of one prefix read."""

    x: Tensor
    vectors: tuple[Tensor | None, ...]
    conv_weight: Tensor
    conv_bias: Tensor | None
    residual: Tensor | None
    grad: Tensor
    grad_activation: Tensor
    pending: tuple[Tensor, Tensor]
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]

    def double(self) -> Prefix:
        return Prefix(*(_double(value) for value in self))


def _double(value):
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        return tuple(_double(part) for part in value)
    return value


def sample(case: Case, dtype: torch.dtype, device: torch.device, affine: bool = True) -> Prefix:
    def make(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=device).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    channels, outs = case.shape[1], case.out_channels
    x = make(*case.shape) * 2 + 1
    # A positive bias: what leaks into the padding would show.
    norm = (make(channels).float(), make(channels).float().abs() + 0.1) if affine else (None, None)
    weight = make(outs, channels // case.groups, *case.kernel)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    shape = reference.convolve(x, weight, None, *geometry).shape
    following = make(*shape) * 2 - 1
    vectors = (make(outs).float(), torch.rand(outs, device=device) + 0.5, make(outs).float())
    sums = (make(outs).float() * 9, make(outs).float() * 9)
    coefficients = reference.batch_norm_backward_coefficients(following, *vectors, *sums, 1e-5)
    return Prefix(
        x, (*reference.batch_norm_stats(x), *norm), weight, make(outs) if affine else None,
        make(*shape) if affine else None, make(*shape), make(*case.shape),
        (following, coefficients), geometry,
    )  # fmt: skip


ROWS = Config(32, 16, 16, 4, 2, row_taps=3)
PAIRS = Config(64, 32, 16, 4, 2, pixels=2)
ROW_CASES = {
    "3x3": CASES["3x3"],
    "no idle column": Case((2, 32, 5, 6), 16, (3, 3), padding=(1, 1)),
    "dilated": Case((1, 9, 6, 7), 5, (2, 3), padding=(0, 2), dilation=(2, 2)),
    "stride down, groups": Case((2, 8, 7, 5), 4, (3, 3), (2, 1), (2, 1), (1, 1), 2),
    "narrower than a dilation": Case((3, 4, 5, 1), 3, (3, 3), padding=(1, 3), dilation=(1, 3)),
    "lower than a dilation": Case((2, 4, 2, 6), 3, (3, 3), padding=(3, 1), dilation=(3, 1)),
}
PAIR_CASES = (
    CASES["3x3"],
    CASES["groups"],
    Case((2, 16, 4, 8), 16, (3, 3), padding=(1, 1)),
    Case((3, 40, 5, 1), 33, (3, 3), padding=(1, 1)),
    Case((2, 16, 8, 12), 16, (3, 3), (2, 2), (1, 1)),
    Case((3, 20, 6, 10), 18, (3, 3), (2, 2), (1, 1), groups=2),
)
"""Lines of whole pairs and of half ones, tiles with and without idle channels and pairs."""


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Every launch with one configuration, which a test may exchange."""
    chosen = [SMALL]
    monkeypatch.setattr(tuning, "select", lambda *_: chosen[0])
    return chosen


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def compare(names: str, found, eager, exact, terms: float = 0.0) -> None:
    for name, *parts in zip(names.split(), found, eager, exact, strict=True):
        assert_as_good_as_eager(name, *parts, terms)


def whole_kernels(case: Case) -> Config:
    """A step of the sum takes all rows of the kernel."""
    return ROWS._replace(kernel_rows=case.kernel[0])


FORWARD = [
    *((SMALL, case, torch.float32, True) for case in CASES.values()),
    *((ROWS, case, torch.float32, True) for case in ROW_CASES.values()),
    *((whole_kernels(case), case, torch.float32, True) for case in ROW_CASES.values()),
    *((config, CASES["3x3"], dtype, False) for config in (SMALL, ROWS) for dtype in DTYPES[1:]),
]
# Steps that form a pending gradient: tiles as those that form it before them.
FORMING = [
    *((SMALL._replace(at_steps=1), case) for case in CASES.values()),
    *((ROWS._replace(at_steps=1), case) for case in ROW_CASES.values()),
    *((whole_kernels(case)._replace(at_steps=1), case) for case in ROW_CASES.values()),
]
# Whether the gradient is pending, and whether other users of the activation contribute.
BACKWARD = [
    *((SMALL, c, torch.float32, i % 2 == 0, i % 3 == 0) for i, c in enumerate(CASES.values())),
    *((ROWS, c, torch.float32, i % 2 == 0, i < 2) for i, c in enumerate(ROW_CASES.values())),
    *((whole_kernels(c), c, torch.float32, True, False) for c in ROW_CASES.values()),
    *((PAIRS, c, torch.float32, False, False) for c in PAIR_CASES),
    (SMALL, CASES["3x3"], torch.bfloat16, True, True),
    (SMALL, CASES["3x3"], torch.float16, False, False),
    (ROWS, CASES["3x3"], torch.bfloat16, False, True),
    (PAIRS, CASES["3x3"], torch.bfloat16, False, False),
    (ROWS, CASES["3x3"], torch.float16, True, False),
    *((config, case, torch.float32, True, i % 2 == 0) for i, (config, case) in enumerate(FORMING)),
    (ROWS._replace(at_steps=1), CASES["3x3"], torch.bfloat16, True, False),
    (SMALL._replace(at_steps=1), CASES["groups"], torch.float16, True, False),
]


@pytest.mark.parametrize(("config", "case", "dtype", "affine"), FORWARD)
def test_forward(config, case, dtype, affine, device, tiles):
    tiles[:] = [config]
    given = sample(case, dtype, device, affine)

    def arguments(p: Prefix):
        return (p.x, *p.vectors, 1e-5, p.conv_weight, p.conv_bias, p.residual, *p.geometry)

    output, *statistics = OPS.batch_norm_relu_conv2d(*arguments(given))
    eager = reference.batch_norm_relu_conv2d(*arguments(given))
    exact = reference.batch_norm_relu_conv2d(*arguments(given.double()))
    assert_as_good_as_eager("output", output, eager[0], exact[0])
    # The statistics are those of the output as rounded.
    wanted = reference.batch_norm_stats(output.double())
    compare("mean var", statistics, reference.batch_norm_stats(output), wanted)
    assert output.is_contiguous(memory_format=reference.memory_format_of(given.x))


@pytest.mark.parametrize(("config", "case", "dtype", "pending", "added"), BACKWARD)
def test_backward(config, case, dtype, pending, added, device, tiles):
    tiles[:] = [config]
    given = sample(case, dtype, device, affine=not pending)

    def arguments(p: Prefix):
        rest = p.pending if pending else ()
        other = p.grad_activation if added else None
        return (p.grad, p.x, *p.vectors, 1e-5, p.conv_weight, other, *p.geometry, *rest)

    found = OPS.batch_norm_relu_conv2d_backward(*arguments(given))
    eager = reference.batch_norm_relu_conv2d_backward(*arguments(given))
    exact = reference.batch_norm_relu_conv2d_backward(*arguments(given.double()))
    compare("grad_z", found[:1], eager[:1], exact[:1])
    compare("grad_conv_weight", found[3:], eager[3:], exact[3:])
    activation = reference.batch_norm_relu(given.x, *given.vectors, 1e-5)
    assert not found[0][activation == 0].any(), "the mask is not the forward's"
    sums = [
        reference.batch_norm_relu_backward_reduce(g, x, *p.vectors, 1e-5)
        for g, x, p in (
            (found[0], given.x, given),
            (found[0].double(), given.x.double(), given.double()),
        )
    ]
    terms = float(found[0].double().abs().sum((0, 2, 3)).max())
    compare("sum_dz_x sum_dz", found[1:3], *sums, terms)
    assert found[3].stride() == reference.preserve_layout(found[3], given.conv_weight).stride()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((SMALL, name) for name in ("3x3", "groups", "1x1", "1x1 stride 2")),
        *((ROWS, name) for name in ("3x3", "groups")),
    ],
)
def test_a_gradient_formed_at_each_step_is_the_one_formed_once(config, name, device, tiles):
    given = sample(CASES[name], torch.bfloat16, device)
    arguments = (given.grad, given.x, *given.vectors, 1e-5, given.conv_weight, None)
    found = []
    for at_steps in (0, 1):
        tiles[:] = [config._replace(at_steps=at_steps)]
        found.append(
            OPS.batch_norm_relu_conv2d_backward(*arguments, *given.geometry, *given.pending)
        )
    for once, steps in zip(*found, strict=True):
        assert torch.equal(once, steps)


@pytest.mark.skipif(not interpreter.ACTIVE, reason="a GPU runs that code in every test")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("config", [SMALL, ROWS, ROWS._replace(at_steps=1)])
@pytest.mark.parametrize("arch", [90, 100])
def test_the_packed_code(arch, config, dtype, device, tiles):
    """What a GPU of that architecture is given instead of the arithmetic written out."""
    with ptx.executed(arch) as ran:
        test_forward(config, CASES["3x3"], dtype, True, device, tiles)
        test_backward(config, CASES["3x3"], dtype, True, False, device, tiles)
    assert len(ran) == 2, "one piece of code for the activation, one for a pending gradient"


def test_each_gradient_alone_is_that_of_both(device):
    given = sample(CASES["3x3"], torch.float32, device)
    before = (given.grad, given.x, *given.vectors, 1e-5, given.conv_weight)
    *of_input, of_weight = OPS.batch_norm_relu_conv2d_backward(*before, None, *given.geometry)
    alone = OPS.batch_norm_relu_conv2d_backward_input(*before, *given.geometry)
    for one, both in zip(alone, of_input, strict=True):
        assert torch.equal(one, both)
    alone = OPS.batch_norm_relu_conv2d_backward_weight(*before, *given.geometry)
    assert torch.equal(alone, of_weight)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_coefficients(batch_stats, device):
    x = torch.randn(3, 300, 2, 2, device=device)
    mean, var, weight, *sums = (torch.rand(300, device=device) for _ in range(5))
    given = sums if batch_stats else (None, None)
    arguments = (x, mean, var, weight, *given, 1e-5)
    found = OPS.batch_norm_backward_coefficients(*arguments)
    torch.testing.assert_close(found, reference.batch_norm_backward_coefficients(*arguments))


def test_large_mean_small_variance(device):
    """The statistics of a result far from zero, over several levels of merging."""
    x = torch.zeros(1, 16, 61, 40, device=device).contiguous(memory_format=torch.channels_last)
    residual = torch.randn_like(x) + 1e4
    zeros, ones = torch.zeros(16, device=device), torch.ones(16, device=device)
    weight = torch.zeros(16, 16, 1, 1, device=device)
    output, mean, var = OPS.batch_norm_relu_conv2d(
        x, zeros, ones, None, None, 1e-5, weight, None, residual, (1, 1), (0, 0), (1, 1), 1
    )
    assert torch.equal(output, residual)
    _, eager_mean, invstd = torch.native_batch_norm(
        residual, None, None, None, None, True, 0.0, 0.0
    )
    exact = reference.batch_norm_stats(residual.double())
    compare("mean var", (mean, var), (eager_mean, invstd**-2), exact)


@pytest.mark.parametrize("name", ["residual", "grad_output", "conv_weight"])
def test_a_launcher_names_the_argument_it_refuses(name, device):
    given = sample(CASES["1x1"], torch.float32, device)
    vectors, geometry = (*given.vectors, 1e-5), given.geometry
    wrong = {
        "residual": lambda: OPS.batch_norm_relu_conv2d(
            given.x, *vectors, given.conv_weight, None, given.grad[:, 1:], *geometry
        ),
        "grad_output": lambda: OPS.batch_norm_relu_conv2d_backward_input(
            given.grad[1:], given.x, *vectors, given.conv_weight, *geometry
        ),
        "conv_weight": lambda: OPS.batch_norm_relu_conv2d_backward_weight(
            given.grad, given.x, *vectors, given.conv_weight.double(), *geometry
        ),
    }
    with pytest.raises(RuntimeError, match=name):
        wrong[name]()
