"""Maps of more than 2**31 elements, whose last program reaches where 32 bits do not.

Nothing but that program runs, and memory that nobody touches takes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from preact import device as devices
from preact import reference, tuning
from preact.triton_kernels import batch_norm_relu_conv2d_backward_weight as weight_module
from preact.triton_kernels._maps import Config as PassConfig
from preact.triton_kernels.batch_norm_relu import batch_norm_relu
from preact.triton_kernels.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from preact.triton_kernels.batch_norm_relu_conv2d_backward_input import (
    batch_norm_relu_conv2d_backward_input,
)

from ..evidence import interpreter
from ..tolerances import assert_as_good_as_eager
from .test_conv2d import PAIRS, ROWS, SMALL

pytestmark = pytest.mark.skipif(
    not interpreter.ACTIVE, reason="a GPU has no memory that takes none until it is touched"
)

SHAPE = (33, 64, 1024, 1024)
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)
LINES = 6
"""Lines of the last image that hold values; the others are nought."""


@contextmanager
def last_programs() -> Iterator[None]:
    """Of each launch only the last program runs, and no map is copied before and after it."""
    builder, executor = triton_interpreter.InterpreterBuilder, triton_interpreter.GridExecutor
    place, execute = builder.set_grid_idx, executor.__call__
    dimensions = builder.set_grid_dim
    real: list[tuple[int, ...]] = []

    def executed(self: Any, *args: Any, **kwargs: Any) -> None:
        assert not callable(self.grid)
        real[:] = [tuple(self.grid) + (1,) * (3 - len(self.grid))]
        self.grid = (1, 1, 1)
        execute(self, *args, **kwargs)

    with (
        np.errstate(all="ignore"),  # what other programs would have written is merged as it is
        mock.patch.object(executor, "__call__", executed),
        mock.patch.object(executor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs)),
        mock.patch.object(executor, "_restore_args_dev", return_value=None),
        mock.patch.object(builder, "set_grid_dim", lambda self, *_: dimensions(self, *real[0])),
        mock.patch.object(
            builder, "set_grid_idx", lambda self, *_: place(self, *(n - 1 for n in real[0]))
        ),
    ):
        yield


@pytest.fixture(autouse=True)
def untouched_memory(poisoned_memory_and_true_bfloat16: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def large() -> Tensor:
    """With values in the last lines alone; the rest of new memory is nought."""
    x = torch.empty(SHAPE, dtype=torch.float16, memory_format=torch.channels_last)
    x[-1, :, -LINES:] = torch.randn(SHAPE[1], LINES, SHAPE[3]).half()
    return x


def end(x: Tensor) -> Tensor:
    """The last lines, as a map of their own."""
    return x[-1:, :, -LINES:].contiguous(memory_format=torch.channels_last)


def norm() -> tuple[Tensor, ...]:
    return tuple(torch.rand(SHAPE[1]) + 0.5 for _ in range(4))


def compare(name: str, found: Tensor, wanted: Any, rows: int) -> None:
    """The last program's tile: ``rows`` pixels at the end, the last 16 channels."""
    tile = (slice(-1, None), slice(-16, None), -1, slice(-rows, None))
    eager, exact = wanted(lambda value: value), wanted(lambda value: value.double())
    assert_as_good_as_eager(name, found[tile], eager[tile], exact[tile])


def rows_of(config: Any) -> int:
    results = config.block_m - 2 * (config.row_taps > 1)
    pixels = SHAPE[0] * SHAPE[2] * SHAPE[3]
    return pixels - (pixels - 1) // results * results


def test_a_pass() -> None:
    x, vectors = large(), norm()
    with (
        last_programs(),
        mock.patch.object(tuning, "select", return_value=PassConfig(1024, 4)),
    ):
        found = batch_norm_relu(x, *vectors, 1e-5)
    wanted = reference.batch_norm_relu(end(x), *vectors, 1e-5)
    torch.testing.assert_close(found[-1, :, -1, -4:], wanted[0, :, -1, -4:])


@pytest.mark.parametrize("config", [SMALL, ROWS], ids=["taps", "rows"])
def test_forward(config: Any) -> None:
    x, residual, vectors = large(), large(), norm()
    weight = torch.randn(64, 64, 3, 3).half()
    with last_programs(), mock.patch.object(tuning, "select", return_value=config):
        found, _, _ = batch_norm_relu_conv2d(x, *vectors, 1e-5, weight, None, residual, *GEOMETRY)

    def wanted(to: Any) -> Tensor:
        values = (*map(to, (end(x), *vectors)), 1e-5, to(weight), None, to(end(residual)))
        return reference.batch_norm_relu_conv2d(*values, *GEOMETRY)[0]

    compare("output", found, wanted, rows_of(config))


@pytest.mark.parametrize("config", [SMALL, ROWS], ids=["taps", "rows"])
def test_backward_to_the_input(config: Any) -> None:
    x, grad, following, vectors = large(), large(), large(), norm()
    weight, coefficients = torch.randn(64, 64, 3, 3).half(), torch.randn(4, 64)
    formed = torch.empty_like(grad)
    with last_programs(), mock.patch.object(tuning, "select", return_value=config):
        found, _, _ = batch_norm_relu_conv2d_backward_input(
            grad, x, *vectors, 1e-5, weight, *GEOMETRY, following, coefficients, None, formed
        )

    def wanted(to: Any) -> Tensor:
        values = (*map(to, (end(grad), end(x), *vectors)), 1e-5, to(weight))
        pending = (to(end(following)), to(coefficients))
        return reference.batch_norm_relu_conv2d_backward_input(*values, *GEOMETRY, *pending)[0]

    compare("grad_z", found, wanted, rows_of(config))
    parts = (end(grad), end(following), coefficients)
    exact = reference.formed_gradient(*(part.double() for part in parts))
    tile = (slice(-1, None), slice(None), -1, slice(-16, None))
    eager = reference.formed_gradient(*parts)
    assert_as_good_as_eager("formed", formed[tile], eager[tile], exact[tile])


@pytest.mark.parametrize(
    "config",
    [SMALL._replace(block_k=512), ROWS._replace(block_k=512), PAIRS._replace(block_k=256)],
    ids=["taps", "rows", "pairs"],
)
def test_backward_to_the_weight(config: Any, monkeypatch: Any) -> None:
    """The last program's part of the sum: of its taps, of the last channels."""
    x, grad, vectors = large(), large(), norm()
    weight = torch.empty(64, 64, 3, 3, dtype=torch.float16)
    parts: list[Tensor] = []

    def merged(partial: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, None]:
        parts.append(partial)
        return partial[-1].to(dtype), None

    monkeypatch.setattr(weight_module, "merge_sums", merged)
    monkeypatch.setattr(weight_module, "TILES", 2**31)
    many = devices.Properties("none", 90, 2**31)
    monkeypatch.setattr(weight_module, "devices", SimpleNamespace(properties=lambda _: many))
    with last_programs(), mock.patch.object(tuning, "select", return_value=config):
        weight_module.batch_norm_relu_conv2d_backward_weight(
            grad, x, *vectors, 1e-5, weight, *GEOMETRY
        )
    (partial,) = parts
    pairs = config.pixels
    lines = weight_module._LEAST_STEPS * config.block_k * pairs // SHAPE[3]
    last, before = end(x), end(grad)
    if pairs == 1:
        # A row of the sum is a pixel of the result; by pairs, two of the input.
        before[..., :-lines, :] = 0

    def wanted(to: Any) -> Tensor:
        activation = reference.batch_norm_relu(*map(to, (last, *vectors)), 1e-5).clone()
        if pairs > 1:
            activation[..., :-lines, :] = 0
        shape = (64, 64, 3, 3)
        return torch.nn.grad.conv2d_weight(activation, shape, to(before), padding=1)

    found = partial[-pairs:].sum(0).view(64, 3, 3, 64).permute(0, 3, 1, 2)[-16:, -16:]
    eager, exact = wanted(lambda value: value), wanted(lambda value: value.double())
    taps = {1: (slice(2, 3), slice(2, 3)), 3: (slice(2, 3), slice(0, 3))}[config.row_taps]
    if pairs > 1:
        taps = (slice(0, 3), slice(0, 3))
    cut = (slice(-16, None), slice(-16, None), *taps)
    assert_as_good_as_eager(
        "grad_conv_weight", found[:, :, taps[0], taps[1]].half(), eager[cut], exact[cut]
    )
