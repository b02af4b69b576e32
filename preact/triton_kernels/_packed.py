"""The prologues in half types, two elements at a time, as PTX.

What the compiler makes of the same arithmetic written out takes up to twice as many instructions:
it moves the upper one of two packed elements before it widens it, clears each element by itself
where its row is outside and, on sm_100, adds in pairs only here and there. The results are the
same. A kernel takes the code as a constexpr; where that is empty it does what is written out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

PAIRED = 100
"""Compute capability from which float32 multiplies and adds in pairs, and half types subtract."""

_HALF = {torch.bfloat16: "bf16", torch.float16: "f16"}
_REGISTERS = ".reg .b16 l, h; .reg .b32 a, b, c, d; .reg .b64 x, y, z;"

_Pair = tuple[str, str]


def _widened(to: _Pair, source: str, half: str) -> str:
    if half == "bf16":
        return f"shl.b32 {to[0]}, {source}, 16; and.b32 {to[1]}, {source}, 0xffff0000;"
    return f"mov.b32 {{l, h}}, {source}; cvt.f32.f16 {to[0]}, l; cvt.f32.f16 {to[1]}, h;"


def _centred(to: _Pair, source: str, centre: _Pair, half: str, paired: bool) -> str:
    if paired:
        return (
            f"mov.b32 {{l, h}}, {source};"
            f" sub.f32.{half} {to[0]}, l, {centre[0]}; sub.f32.{half} {to[1]}, h, {centre[1]};"
        )
    subtracted = (f"sub.f32 {r}, {r}, {c};" for r, c in zip(to, centre, strict=True))
    return " ".join((_widened(to, source, half), *subtracted))


def _multiplied(to: _Pair, by: _Pair, plus: _Pair, paired: bool) -> str:
    """``to * by + plus``, rounded once."""
    if paired:
        operands = (
            f"mov.b64 {r}, {{{v[0]}, {v[1]}}};" for r, v in zip("xyz", (to, by, plus), strict=True)
        )
        return " ".join(
            (*operands, "fma.rn.f32x2 x, x, y, z;", f"mov.b64 {{{to[0]}, {to[1]}}}, x;")
        )
    return " ".join(f"fma.rn.f32 {r}, {r}, {b}, {p};" for r, b, p in zip(to, by, plus, strict=True))


def _kept(low: str, high: str) -> str:
    """The result: ``c``, where the masks are set. Where both are of one row, which a compiler sees,
    that is its word as it is."""
    halves = f"mov.b32 {{l, _}}, {low}; mov.b32 {{_, h}}, {high}; mov.b32 d, {{l, h}};"
    return f"{halves} and.b32 $0, c, d;"


def _code(*parts: str) -> str:
    return " ".join(("{", _REGISTERS, *parts, "}"))


def _kind(dtype: torch.dtype, capability: int) -> tuple[str, bool] | None:
    """None where the kernels do without: in float32, and in the interpreter, which runs no PTX."""
    if dtype not in _HALF or knobs.runtime.interpret:
        return None
    return _HALF[dtype], capability >= PAIRED


def activation_code(dtype: torch.dtype, capability: int) -> str:
    """Of ``activate``: two values, mean, scale and bias of two channels, a mask of each."""
    kind = _kind(dtype, capability)
    if kind is None:
        return ""
    half, paired = kind
    return _code(
        _centred(("a", "b"), "$1", ("$2", "$3"), half, paired),
        _multiplied(("a", "b"), ("$4", "$5"), ("$6", "$7"), paired),
        f"cvt.rn.relu.{half}x2.f32 c, b, a;",
        _kept("$8", "$9"),
    )


def gradient_code(dtype: torch.dtype, capability: int) -> str:
    """Of ``form``: two gradients and values, scale, slope, centre and offset of two channels, a
    mask of each."""
    kind = _kind(dtype, capability)
    if kind is None:
        return ""
    half, paired = kind
    return _code(
        _centred(("a", "b"), "$2", ("$7", "$8"), half, paired),
        _multiplied(("a", "b"), ("$5", "$6"), ("$9", "$10"), paired),
        _widened(("c", "d"), "$1", half),
        _multiplied(("c", "d"), ("$3", "$4"), ("a", "b"), paired),
        f"cvt.rn.{half}x2.f32 c, d, c;",
        _kept("$11", "$12"),
    )


@triton.jit
def activate(values, mean, scale, bias, inside, PADDED: tl.constexpr, CODE: tl.constexpr):
    """``relu((values - mean) * scale + bias)`` in the type of ``values``, by every kernel's
    arithmetic; nought where not ``inside``, a mask of rows or elements, as may be where PADDED."""
    if CODE == "":
        z = (values.to(tl.float32) - mean) * scale + bias
        if PADDED:
            # A factor takes half the instructions of selecting.
            z *= tl.where(inside, 1.0, 0.0)
        activation = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(values.dtype)
    else:
        kept = tl.where(inside | (not PADDED), -1, 0)
        activation = tl.inline_asm_elementwise(
            CODE, "=r,r,f,f,f,f,f,f,r,r", [values, mean, scale, bias, kept],
            dtype=values.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return activation


@triton.jit
def form(grad, x, scale, slope, centre, offset, inside, PADDED: tl.constexpr, CODE: tl.constexpr):
    """``scale * grad + slope * (x - centre) + offset`` in the type of ``grad``; nought where not
    ``inside``, as both maps are there, as may be where PADDED."""
    if CODE == "":
        rest = slope * (x.to(tl.float32) - centre) + offset
        if PADDED:
            # A factor takes half the instructions of selecting.
            rest *= tl.where(inside, 1.0, 0.0)
        formed = (scale * grad.to(tl.float32) + rest).to(grad.dtype)
    else:
        kept = tl.where(inside | (not PADDED), -1, 0)
        formed = tl.inline_asm_elementwise(
            CODE, "=r,r,r,f,f,f,f,f,f,f,f,r,r", [grad, x, scale, slope, centre, offset, kept],
            dtype=grad.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return formed
