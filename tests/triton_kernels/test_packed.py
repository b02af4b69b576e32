"""The packed prologues element by element: numbers that are none, zeros, halves of a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preact.triton_kernels import _packed

from ..evidence import interpreter, ptx

pytestmark = pytest.mark.skipif(not interpreter.ACTIVE, reason="runs PTX in the interpreter alone")

VALUES = [0.0, -0.0, 1.5, -1.5, 3e-5, -3e-5, 250.0, float("nan"), float("inf"), float("-inf")]


def word(low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    return (low.view(torch.int16).numpy().view(np.uint16).astype(np.uint64)) | (
        high.view(torch.int16).numpy().view(np.uint16).astype(np.uint64) << np.uint64(16)
    )


def halves(packed: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    parts = (packed & np.uint64(0xFFFF), packed >> np.uint64(16))
    return [torch.from_numpy(p.astype(np.uint16).view(np.int16)).view(dtype) for p in parts]


def bits(values: torch.Tensor) -> np.ndarray:
    return values.numpy().view(np.uint32).astype(np.uint64)


def run(code: str, *operands: np.ndarray) -> np.ndarray:
    registers = ptx.Registers({f"${i + 1}": value for i, value in enumerate(operands)})
    with np.errstate(all="ignore"):
        registers.run(code)
    return registers.held["$0"]


@pytest.mark.parametrize("inside", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activation(dtype, arch, inside):
    pair = torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES[::-1], dtype=dtype)
    vectors = [torch.linspace(low, low + 2, len(VALUES)) for low in (-1, 0.5, -1.5)]
    mean, scale, bias = vectors
    with ptx.executed(arch):
        code = _packed.activation_code(dtype, arch)
    # Each element brings a whole word; the code takes the half of its place.
    kept = [np.full(len(VALUES), 0xFFFFFFFF if of else 0, np.uint64) for of in inside]
    operands = [bits(v) for v in vectors for _ in range(2)]
    found = run(code, word(*pair), *operands, *kept)
    for value, result, kept in zip(pair, halves(found, dtype), inside, strict=True):
        z = ((value.float() - mean).double() * scale.double() + bias.double()).float()
        wanted = torch.relu(z).to(dtype) if kept else torch.zeros_like(value)
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
        assert not torch.signbit(result[result == 0]).any()


@pytest.mark.parametrize("inside", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient(dtype, arch, inside):
    pair = torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES[::-1], dtype=dtype)
    values = pair[::-1]
    vectors = [torch.linspace(low, low + 2, len(VALUES)) for low in (0.5, -1, -2, 3)]
    scale, slope, centre, offset = vectors
    with ptx.executed(arch):
        code = _packed.gradient_code(dtype, arch)
    operands = [bits(v) for v in vectors for _ in range(2)]
    masks = [np.full(len(VALUES), 0xFFFFFFFF if of else 0, np.uint64) for of in inside]
    found = run(code, word(*pair), word(*values), *operands, *masks)
    for grad, x, result, kept in zip(pair, values, halves(found, dtype), inside, strict=True):
        inner = ((x.float() - centre).double() * slope.double() + offset.double()).float()
        wanted = (grad.double() * scale.double() + inner.double()).float().to(dtype)
        wanted = wanted if kept else torch.zeros_like(grad)
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def test_an_instruction_that_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match="ex2"):
        run("{ ex2.approx.f32 $0, $1; }", np.zeros(1, np.uint64))


def test_float32_and_the_interpreter_do_without():
    assert _packed.activation_code(torch.bfloat16, 90) == ""
    with ptx.executed(90):
        assert _packed.gradient_code(torch.float32, 90) == ""
