"""The CUDA kernels of the fused 1x1 convolution, run on the CPU against float64 formulas."""

from __future__ import annotations

import itertools

import pytest
import torch

from preact import reference

from . import cuda_emulation as emulation
from .tolerances import assert_as_good_as_eager, magnitude

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not())

PROGRAM = "batch_norm_relu_conv2d"
EPS = 1e-5
# math, dtype, columns of a tile
KINDS = [
    ("half", torch.float16, 64),
    ("half", torch.bfloat16, 128),
    ("half", torch.float16, 128),
    ("half", torch.bfloat16, 64),
    ("tf32", torch.float32, 64),
    ("float", torch.float32, 64),
]
# batch, height, width, channels, out channels, stride, elements off alignment
SHAPES = [
    (2, 9, 9, 72, 136, (1, 1), 0),
    (3, 5, 11, 37, 67, (1, 1), 0),
    (2, 9, 10, 40, 16, (2, 1), 0),
    (1, 15, 13, 16, 40, (2, 2), 1),
    (1, 1, 1, 1, 1, (1, 1), 0),
    (3, 13, 17, 16, 8, (1, 1), 0),  # several splits of the rows
]
OPS = ("forward", "backward_input", "backward_weight")


def to_tf32(values):
    """As cvt.rna.tf32 rounds: ten bits of mantissa, ties away from zero."""
    bits = values.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def make(kind, shape, op, seed=0, affine=True, pending=False, mean=0.5, seeds=3):
    """A case for the program, and the tensors it was made of.

    ``affine``: with every argument that may be absent.
    """
    math, dtype, block_n = kind
    batch, height, width, channels, out_channels, stride, offset = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator)

    def image(*size):
        return random(*size).to(dtype).contiguous(memory_format=torch.channels_last)

    x = (random(batch, channels, height, width) * 2 + mean).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    batch_mean, batch_var = reference.batch_norm_stats(x)
    out_size = tuple(
        (size - 1) // step + 1 for size, step in zip((height, width), stride, strict=True)
    )
    tensors = {
        "input": x,
        "mean": batch_mean,
        "var": batch_var,
        "weight": random(channels) if affine else None,
        "bias": random(channels) + 0.3 if affine else None,
        "conv_weight": (random(out_channels, channels) / channels**0.5).to(dtype),
        "conv_bias": random(out_channels).to(dtype) if affine and op == "forward" else None,
        "residual": None,
        "grad_output": None,
        "grad_activation": None,
        "pending_input": None,
        "coefficients": None,
    }
    if op != "forward":
        tensors["grad_output"] = image(batch, out_channels, *out_size)
        if affine:
            tensors["grad_activation"] = image(batch, channels, height, width)
        if pending:
            tensors["pending_input"] = image(batch, out_channels, *out_size)
            tensors["coefficients"] = random(4, out_channels)
    elif affine:
        tensors["residual"] = image(batch, out_channels, *out_size)
    case = {
        "op": op, "math": math, "dtype": str(dtype).removeprefix("torch."), "block_n": block_n,
        "batch": batch, "height": height, "width": width, "channels": channels,
        "out_channels": out_channels, "stride_h": stride[0], "stride_w": stride[1],
        "offset": offset, "pending": int(pending), "eps": EPS, "seeds": seeds, **tensors,
    }  # fmt: skip
    return case, tensors


def expected(math, op, tensors, stride, dtype):
    """The op's results by the formulas of ``reference`` in ``dtype``.

    tf32 rounds what is multiplied, which is judged as such: operands are rounded first.
    """
    t = {name: None if value is None else value.to(dtype) for name, value in tensors.items()}
    norm = (t["mean"], t["var"], t["weight"], t["bias"], EPS)
    if dtype != torch.float64:  # vectors keep their accumulation type
        norm = (*(tensors[name] for name in ("mean", "var", "weight", "bias")), EPS)
    x = t["input"]
    conv_weight = t["conv_weight"][:, :, None, None]
    geometry = (list(stride), [0, 0], [1, 1], 1)
    tf32 = math == "tf32"
    rounded = (lambda values: to_tf32(values).to(dtype)) if tf32 else (lambda values: values)
    if op == "forward":
        activation = rounded(reference.batch_norm_relu(x, *norm))
        output = reference.convolve(activation, rounded(conv_weight), t["conv_bias"], *geometry)
        output = output if t["residual"] is None else output + t["residual"]
        return (output,)
    grad = t["grad_output"]
    if t["pending_input"] is not None:
        rows = tensors["coefficients"].to(reference.accumulate_dtype(dtype))
        scale, slope, centre, offset = (reference.per_channel(row, grad) for row in rows)
        grad = (scale * grad + (slope * (t["pending_input"] - centre) + offset)).to(dtype)
    grad = rounded(grad)
    if op == "backward_input":
        return reference.batch_norm_relu_conv2d_backward(
            grad, x, *norm, rounded(conv_weight), t["grad_activation"], *geometry
        )[:3]
    activation = rounded(reference.batch_norm_relu(x, *norm))
    return (
        torch.ops.aten.convolution_backward.default(
            grad, activation, conv_weight, None, *geometry[:3], False, [0, 0], 1,
            [False, True, False],
        )[1],
    )  # fmt: skip


def images(path, dtype, like):
    batch, channels, height, width = like.shape
    return emulation.read(path, dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


def check(folder, kind, op, tensors, stride):
    """What the program left in ``folder``."""
    math, dtype, _ = kind
    exact = expected(math, op, tensors, stride, torch.float64)
    eager = expected(math, op, tensors, stride, dtype)
    if op == "forward":
        output = images(folder / "output.out", dtype, exact[0])
        assert_as_good_as_eager("output", output, eager[0], exact[0])
        moments = reference.batch_norm_stats(output.double())
        single = reference.batch_norm_stats(output)
        for name, wanted, other in zip(("out_mean", "out_var"), moments, single, strict=True):
            result = emulation.read(folder / f"{name}.out", torch.float32)
            assert_as_good_as_eager(name, result, other, wanted)
    elif op == "backward_input":
        grad_z = images(folder / "grad_z.out", dtype, exact[0])
        assert torch.equal(grad_z != 0, mask_of(tensors) & (grad_z != 0)), "mask"
        terms = magnitude(tensors["grad_output"])
        assert_as_good_as_eager("grad_z", grad_z, eager[0], exact[0], terms)
        sums = reference.batch_norm_relu_backward_reduce(
            grad_z.double(),
            *(None if tensors[n] is None else tensors[n].double() for n in NORM),
            EPS,
        )
        spread = float(grad_z.double().abs().sum((0, 2, 3)).max())
        for name, wanted in zip(("grad_weight", "grad_bias"), sums, strict=True):
            result = emulation.read(folder / f"{name}.out", torch.float32)
            assert_as_good_as_eager(name, result, wanted.float(), wanted, spread)
    else:
        result = emulation.read(folder / "grad_conv_weight.out", dtype).view(exact[0].shape)
        assert_as_good_as_eager("grad_conv_weight", result, eager[0], exact[0])


NORM = ("input", "mean", "var", "weight", "bias")


def mask_of(tensors):
    """Where z > 0 with the kernels' arithmetic; a fused multiply-add has the exact sum's sign."""
    x, mean, var, weight, bias = (tensors[name] for name in NORM)
    scale = 1 / torch.sqrt(var + torch.tensor(EPS))
    scale = scale if weight is None else scale * weight
    centred = x.float() - reference.per_channel(mean, x)
    z = centred.double() * reference.per_channel(scale.double(), x)
    return (z if bias is None else z + reference.per_channel(bias.double(), x)) > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_against_float64(kind, op, tmp_path):
    cases = {}
    for index, (shape, pending) in enumerate(itertools.product(SHAPES, [False, True])):
        if pending and (op == "forward" or kind[2] == 128):
            continue
        case, tensors = make(kind, shape, op, index, affine=index not in (2, 5), pending=pending)
        cases[emulation.prepare(tmp_path / str(index), case)] = (tensors, shape[5])
    result = emulation.run(emulation.compile_program(PROGRAM), list(cases))
    assert result.returncode == 0, result.stderr
    for folder, (tensors, stride) in cases.items():
        check(folder, kind, op, tensors, stride)
