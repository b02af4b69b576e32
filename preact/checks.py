"""Argument checks: eager PyTorch's exception types, with messages that name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import Conv, Norm, Statistics
from .reference import accumulate_dtype

if TYPE_CHECKING:
    from .plans import Geometry

_VECTORS = ("running_mean", "running_var", "weight", "bias")


def compute_type(tensor: Tensor) -> torch.dtype:
    """The type a convolution uses ``tensor`` in: autocast's where that applies, else its own."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """One number for both dimensions of an image, or one for each."""
    if isinstance(value, int):
        return value, value
    return tuple(value) if len(value) != 1 else (value[0], value[0])


def _two(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    numbers = pair(value)
    if len(numbers) != 2:
        raise RuntimeError(f"{name} must be one number or two, got {value}")
    return numbers


def same_kind(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype


def _check_norm_of(shape: Sequence[int], input: Tensor, norm: Norm) -> None:
    if norm.eps <= 0:
        raise ValueError(f"eps must be positive, got {norm.eps}")
    if norm.momentum is None:
        raise TypeError("momentum must be a number, got None")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("running_mean and running_var must both be given, or both be None")
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise RuntimeError(
            "running_mean and running_var must be given when training=False, got None"
        )
    for name, vector in zip(_VECTORS, norm[:4], strict=True):
        if vector is None:
            continue
        if tuple(vector.shape) != (shape[1],):
            raise RuntimeError(
                f"{name} must have {shape[1]} elements, one per channel of input,"
                f" got shape {tuple(vector.shape)}"
            )
        if vector.device != input.device:
            raise RuntimeError(
                f"{name} must be on the device of input, {input.device}, got {vector.device}"
            )
        if vector.dtype not in (input.dtype, accumulate_dtype(input.dtype)):
            raise RuntimeError(
                f"{name} must be of input's type, {input.dtype}, or its accumulation type,"
                f" got {vector.dtype}"
            )
    count = shape[0]
    for size in shape[2:]:
        count *= size
    if norm.training and count == 1:
        raise ValueError(
            f"input must have more than 1 value per channel in training, got shape {tuple(shape)}"
        )


def check_norm(input: Tensor, norm: Norm) -> None:
    """Raise for a batch norm that cannot be applied to ``input``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() < 2:
        raise RuntimeError(f"input must have at least 2 dimensions, got {input.dim()}")
    if not (input.is_floating_point() or input.is_complex()):
        raise NotImplementedError(f"input must be floating point, got {input.dtype}")
    _check_norm_of(input.shape, input, norm)


def geometry_of(conv: Conv) -> Geometry | None:
    """The convolution's numbers; None where only ``conv2d`` itself can take them."""
    stride, dilation = _two("stride", conv.stride), _two("dilation", conv.dilation)
    if not isinstance(conv.padding, str):
        return stride, _two("padding", conv.padding), dilation, conv.groups
    if conv.padding == "valid":
        return stride, (0, 0), dilation, conv.groups
    totals = [d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
    if conv.padding != "same" or any(total % 2 for total in totals):
        return None
    return stride, tuple(total // 2 for total in totals), dilation, conv.groups


def output_shape(shape: Sequence[int], conv: Conv, geometry: Geometry | None) -> tuple[int, ...]:
    """Shape of a convolution's result from its input's."""
    assert geometry is not None
    stride, padding, dilation, _ = geometry
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            shape[2:], conv.weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return (shape[0], conv.weight.size(0), *spatial)


def _check_conv_of(shape: Sequence[int], input: Tensor, conv: Conv) -> None:
    weight = conv.weight
    if len(shape) not in (3, 4) or weight.dim() != 4:
        raise RuntimeError(
            f"input must be [N, C, H, W] and conv_weight 4-dimensional, got {tuple(shape)}"
            f" and {tuple(weight.shape)}"
        )
    if shape[-3] != weight.size(1) * conv.groups:
        raise RuntimeError(
            f"conv_weight of shape {tuple(weight.shape)} with groups={conv.groups} expects input"
            f" to have {weight.size(1) * conv.groups} channels, got {shape[-3]}"
        )
    _two("stride", conv.stride)
    dilation = _two("dilation", conv.dilation)
    if not isinstance(conv.padding, str):
        padding = _two("padding", conv.padding)
        for size, kernel, pad, step in zip(
            shape[-2:], weight.shape[2:], padding, dilation, strict=True
        ):
            if size + 2 * pad < step * (kernel - 1) + 1:
                raise RuntimeError(
                    f"conv_weight of shape {tuple(weight.shape)} is larger than the padded input,"
                    f" {tuple(shape)} with padding={conv.padding} and dilation={conv.dilation}"
                )
    if weight.device != input.device:
        raise RuntimeError(
            f"conv_weight must be on the device of input, {input.device}, got {weight.device}"
        )
    for name, tensor in (("conv_weight", weight), ("conv_bias", conv.bias)):
        if tensor is not None and compute_type(tensor) != compute_type(input):
            raise RuntimeError(f"{name} must be of input's type, {input.dtype}, got {tensor.dtype}")
    if conv.bias is not None and tuple(conv.bias.shape) != (weight.size(0),):
        raise RuntimeError(
            f"conv_bias must have {weight.size(0)} elements, got shape {tuple(conv.bias.shape)}"
        )
    if conv.bias is not None and conv.bias.device != input.device:
        raise RuntimeError(
            f"conv_bias must be on the device of input, {input.device}, got {conv.bias.device}"
        )


def check_conv(input: Tensor, conv: Conv) -> None:
    """Raise for a convolution that cannot be applied to ``input``."""
    _check_conv_of(input.shape, input, conv)


def check_layer(shape: Sequence[int], input: Tensor, norm: Norm, conv: Conv) -> None:
    """Both checks for an inner layer, whose input of ``shape`` does not exist yet."""
    _check_norm_of(shape, input, norm)
    _check_conv_of(shape, input, conv)


def layer_shapes(
    input: Tensor, layers: Sequence[tuple[Norm, Conv]], geometries: Sequence[Geometry | None]
) -> list[tuple[int, ...]]:
    """Shape of each layer's input and of the last one's result, every layer checked on the way."""
    shapes = [tuple(input.shape)]
    for (norm, conv), geometry in zip(layers, geometries, strict=False):
        check_layer(shapes[-1], input, norm, conv)
        if geometry is None:
            break
        shapes.append(output_shape(shapes[-1], conv, geometry))
    return shapes


def check_residual(residual: Tensor, shape: Sequence[int]) -> None:
    """Raise for a residual that does not broadcast with a result of ``shape``."""
    if tuple(residual.shape) == tuple(shape):
        return
    try:
        torch.broadcast_shapes(residual.shape, shape)
    except RuntimeError as error:
        raise RuntimeError(
            f"residual of shape {tuple(residual.shape)} does not broadcast with the convolution's"
            f" result of shape {tuple(shape)}"
        ) from error


def check_statistics(input: Tensor, statistics: Statistics | None) -> None:
    """Raise for handed-on statistics that cannot be those of ``input``."""
    if statistics is None:
        return
    for name, vector in zip(("mean", "var"), statistics, strict=True):
        if tuple(vector.shape) != (input.size(1),) or vector.device != input.device:
            raise RuntimeError(
                f"statistics: {name} must have {input.size(1)} elements on {input.device}, got"
                f" shape {tuple(vector.shape)} on {vector.device}"
            )
