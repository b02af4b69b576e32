"""Schemas, fakes and the fallback of ``torch.ops.preact``.

The schemas stand here, once, for every backend (``backends.triton`` defines them in a namespace of
its own), so that the ops exist with or without a native library; C++ registers
its kernels for them under a device's dispatch key when ``backends.cpp`` loads it. Where no kernel
is registered, for a device or because nothing was built, the formulas of ``reference`` run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, reference_dense, reference_pool, reference_units

_NORM = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias"
_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_PENDING = "Tensor? pending_input=None, Tensor? coefficients=None"

SCHEMAS: dict[str, str] = {
    "batch_norm_stats": "(Tensor input) -> (Tensor, Tensor)",
    "batch_norm_relu": f"(Tensor input, {_NORM}, float eps) -> Tensor",
    "identity_add": "(Tensor input, Tensor other) -> (Tensor, Tensor, Tensor)",
    "batch_norm_relu_backward_reduce": (
        f"(Tensor grad_output, Tensor input, {_NORM}, float eps) -> (Tensor, Tensor)"
    ),
    "batch_norm_relu_backward_apply": (
        f"(Tensor grad_output, Tensor input, {_NORM}, Tensor? grad_weight, Tensor? grad_bias,"
        " Tensor? grad_skip, float eps) -> Tensor"
    ),
    "batch_norm_relu_conv2d": (
        f"(Tensor input, {_NORM}, float eps, Tensor conv_weight, Tensor? conv_bias,"
        f" Tensor? residual, {_CONV}) -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_relu_conv2d_backward_input": (
        f"(Tensor grad_output, Tensor input, {_NORM}, float eps, Tensor conv_weight, {_CONV},"
        f" {_PENDING}) -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_relu_conv2d_backward_weight": (
        f"(Tensor grad_output, Tensor input, {_NORM}, float eps, Tensor conv_weight, {_CONV},"
        f" {_PENDING}) -> Tensor"
    ),
    "batch_norm_relu_conv2d_backward": (
        f"(Tensor grad_output, Tensor input, {_NORM}, float eps, Tensor conv_weight,"
        f" Tensor? grad_activation, {_CONV}, {_PENDING}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "batch_norm_relu_conv2d_into": (
        f"(Tensor input, {_NORM}, float eps, Tensor conv_weight, {_CONV}, Tensor(a!) output)"
        " -> (Tensor, Tensor)"
    ),
    "batch_norm_relu_conv2d_backward_add": (
        f"(Tensor grad_output, Tensor input, {_NORM}, float eps, Tensor conv_weight, {_CONV},"
        " Tensor? pending_input, Tensor? coefficients, Tensor grad_skip, Tensor(a!) grad_input)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_backward_coefficients": (
        "(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? grad_weight,"
        " Tensor? grad_bias, float eps) -> Tensor"
    ),
}

# Several of those in a row, of the native backend alone: what they save is the way to Python.
COMPOSED: dict[str, str] = {
    "residual_units": (
        "(Tensor input, Tensor?[] parameters, float[] eps, int[] geometries, int depth) -> Tensor[]"
    ),
    "residual_units_backward": (
        "(Tensor grad_output, Tensor[] inputs, Tensor?[] parameters, float[] eps,"
        " int[] batch_stats, int[] geometries, int depth) -> Tensor[]"
    ),
    "update_running_stats": (
        "(Tensor(a!)[] running, Tensor[] batch, float[] momenta, int count) -> ()"
    ),
}

_POOL = "int[2] kernel, int[2] stride, int[2] padding, bool average"

# Of the native backend alone as well.
POOLED: dict[str, str] = {
    "batch_norm_relu_pool2d": (f"(Tensor input, {_NORM}, float eps, {_POOL}) -> (Tensor, Tensor)"),
    "batch_norm_relu_pool2d_backward": (
        f"(Tensor grad_output, Tensor positions, Tensor input, {_NORM}, float eps,"
        f" bool batch_stats, {_POOL}) -> (Tensor, Tensor, Tensor)"
    ),
}


DENSE: dict[str, str] = {
    "dense_block": (
        "(Tensor input, Tensor?[] parameters, float[] eps, int[] geometries, bool save) -> Tensor[]"
    ),
    "dense_block_backward": (
        "(Tensor grad_output, Tensor[] found, Tensor?[] parameters, float[] eps,"
        " int[] geometries, bool needs_input) -> Tensor[]"
    ),
}


def _vectors(input: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` unwritten per-channel vectors for ``input``."""
    dtype = reference.accumulate_dtype(input.dtype)
    return tuple(input.new_empty(input.size(1), dtype=dtype) for _ in range(count))


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=reference.memory_format_of(input))


def _fake_stats(input: Tensor) -> tuple[Tensor, ...]:
    return _vectors(input, 2)


def _fake_apply(input: Tensor, *_: Any) -> Tensor:
    return _like(input)


def _fake_identity_add(input: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return (_like(input), *_vectors(input, 2))


def _fake_reduce(grad_output: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _vectors(input, 2)


def _fake_backward_apply(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return _like(input)


def _fake_conv2d(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    *geometry: Any,
) -> tuple[Tensor, ...]:
    plain = reference.convolve(input.to(conv_weight.dtype), conv_weight, conv_bias, *geometry)
    format = reference.memory_format_of(input)
    output = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device, memory_format=format)
    return (output, *_vectors(output, 2))


def _fake_conv2d_backward_input(grad_output: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (_like(input), *_vectors(input, 2))


def _fake_conv2d_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    *_: Any,
) -> Tensor:
    return _like(conv_weight)


def _fake_conv2d_backward(
    grad_output: Tensor, input: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    grad_weight = _fake_conv2d_backward_weight(grad_output, input, *arguments)
    return (*_fake_conv2d_backward_input(grad_output, input), grad_weight)


def _fake_conv2d_into(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _vectors(arguments[-1], 2)


def _fake_conv2d_backward_add(
    grad_output: Tensor, input: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _fake_conv2d_backward(grad_output, input, *arguments)[1:]


def _fake_coefficients(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(4, input.size(1), dtype=reference.accumulate_dtype(input.dtype))


_FAKES: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _fake_stats,
    "batch_norm_relu": _fake_apply,
    "identity_add": _fake_identity_add,
    "batch_norm_relu_backward_reduce": _fake_reduce,
    "batch_norm_relu_backward_apply": _fake_backward_apply,
    "batch_norm_relu_conv2d": _fake_conv2d,
    "batch_norm_relu_conv2d_backward_input": _fake_conv2d_backward_input,
    "batch_norm_relu_conv2d_backward_weight": _fake_conv2d_backward_weight,
    "batch_norm_relu_conv2d_backward": _fake_conv2d_backward,
    "batch_norm_relu_conv2d_into": _fake_conv2d_into,
    "batch_norm_relu_conv2d_backward_add": _fake_conv2d_backward_add,
    "batch_norm_backward_coefficients": _fake_coefficients,
}

# Kernels of these serve part of what the ops take, and hand the rest on to the second overload.
_PARTLY_NATIVE = (
    "batch_norm_relu_conv2d",
    "batch_norm_relu_conv2d_into",
    "batch_norm_relu_conv2d_backward",
    "batch_norm_relu_conv2d_backward_add",
)


def define(
    namespace: str,
    implementation: Callable[[str], Callable[..., Any]],
    partly: Sequence[str] = (),
) -> torch.library.Library:
    """Define every op in ``namespace``; the ops live as long as the library that is returned.

    Those of ``partly`` get a second overload ``.reference``, which no kernel replaces.
    """
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        for overload in ("", ".reference") if name in partly else ("",):
            library.define(name + overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name + overload, implementation(name), "CompositeExplicitAutograd")
            fake = _FAKES[name]
            torch.library.register_fake(f"{namespace}::{name}{overload}", fake, lib=library)
    return library


_library = define("preact", lambda name: getattr(reference, name), _PARTLY_NATIVE)

for _schemas, _formulas in (
    (COMPOSED, reference_units), (POOLED, reference_pool), (DENSE, reference_dense),
):  # fmt: skip
    for _name, _schema in _schemas.items():
        _formula = getattr(_formulas, _name)
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name, _formula, "CompositeExplicitAutograd")
        torch.library.register_fake(f"preact::{_name}", _formula, lib=_library)


def allows_tf32() -> bool:
    """Whether float32 convolutions may multiply in TF32; asked by the setting of convolutions
    alone, as that of all of cuDNN raises where the others differ."""
    cudnn: Any = torch.backends.cudnn  # whose annotations lack conv
    return bool(cudnn.conv.fp32_precision == "tf32")


# The CUDA kernels ask, at each call: PyTorch's stable ABI does not tell.
_library.define("allows_tf32() -> bool")
_library.impl("allows_tf32", allows_tf32, "CompositeExplicitAutograd")
