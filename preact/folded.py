"""A convolution with the batch norm behind it in its weights: for evaluation without gradients.

Nothing of the modules changes. The folded weights are kept beside them, made anew when a tensor
that they came from is another or has been written to, and are in no copy, pickle or state_dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, remembered
from .calls import BatchNorm, batch_norm, fused_batch_norm_relu
from .reference import memory_format_of

ALWAYS = "in the convolution before it"
WHERE_FASTER = f"{ALWAYS}, for shapes where that is measured to be faster"

_MOST_SHAPES = 4
_Source = tuple[Tensor | None, int, int]
_UNCOUNTED = -1  # writes to inference tensors


class _Folded(NamedTuple):
    sources: tuple[_Source, ...]
    """What the weights were made of: each tensor, how often it was written to, and its memory."""
    held: list[Tensor]
    """That memory, lest another tensor comes to lie there."""
    eps: float | None
    dtype: torch.dtype
    made: dict[tuple[int, ...], tuple[Tensor, Tensor | None]]
    """Weight and bias by an image's shape, for which oneDNN lays them out; else by ()."""


_folded: WeakKeyDictionary[nn.Conv2d, dict[bool, _Folded]] = WeakKeyDictionary()
"""Of each convolution the weights without and with a norm."""


def _state(tensor: Tensor | None) -> _Source:
    if tensor is None:
        return None, 0, 0
    return tensor, _UNCOUNTED if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _parameters(
    conv: nn.Conv2d, bn: BatchNorm | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in ``dtype`` of the convolution that gives ``bn(conv(input))``.

    The weight is in oneDNN's own layout for an input of ``shape``, plain for ().
    """
    tensors = [conv.weight, conv.bias]
    if bn is not None:
        tensors += (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    sources = tuple(map(_state, tensors))
    eps = None if bn is None else bn.eps
    of_conv = _folded.setdefault(conv, {})
    known = of_conv.get(bn is not None)
    if (
        known is None
        or known.eps != eps
        or known.dtype != dtype
        or any(
            new[0] is not old[0] or new[1:] != old[1:] or new[1] == _UNCOUNTED
            for new, old in zip(sources, known.sources, strict=True)
        )
    ):
        held = [tensor.detach() for tensor in tensors if tensor is not None]
        known = of_conv[bn is not None] = _Folded(sources, held, eps, dtype, {})
    image = shape[1:]  # the layout hardly depends on how many there are
    found = known.made.get(image)
    if found is None:
        weight, bias = (conv.weight, conv.bias) if bn is None else _fold(conv, bn)
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        if shape:
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, conv.padding, conv.stride, conv.dilation, conv.groups, shape
            )
        if len(known.made) >= _MOST_SHAPES:
            known.made.clear()
        found = known.made[image] = (weight, bias)
    return found


def _fold(conv: nn.Conv2d, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    exact = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(var.to(exact) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(exact)
    bias = -mean.to(exact) if conv.bias is None else conv.bias.to(exact) - mean.to(exact)
    bias = bias * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(exact)
    return conv.weight.to(exact) * scale.view(-1, 1, 1, 1), bias


def forget(convs: Iterable[nn.Module]) -> None:
    """Drops the folded weights of those of ``convs`` that have any."""
    for conv in convs:
        if isinstance(conv, nn.Conv2d):
            _folded.pop(conv, None)


def set_folds(model: nn.Module, folds: bool) -> dict[nn.Module, dict[nn.Module, str]]:
    """Sets ``folds`` of this package's own modules in ``model``: the norms each has, and when."""
    found: dict[nn.Module, dict[nn.Module, str]] = {}
    for module in model.modules():
        norms = getattr(module, "folded_norms", None)
        if norms is not None:
            module.__dict__["folds"] = folds
            found[module] = norms()
    return found


def applies(input: Tensor, norms: Sequence[BatchNorm]) -> bool:
    """Whether a call may run with ``norms`` folded: nothing is differentiated, trained or traced.

    Under torch.compile Inductor's own freezing folds.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    for bn in norms:
        if bn.training or bn.running_mean is None or bn.running_var is None:
            return False
    transformed: bool = torch._C._are_functorch_transforms_active() or remembered.carries_tangents()
    return not transformed and input.dim() == 4 and input.layout is torch.strided


def runs_in_one_dnn(input: Tensor) -> bool:
    """Whether oneDNN convolves ``input``, with what follows in its own pass."""
    if input.device.type != "cpu" or input.numel() == 0:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if input.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return input.dtype == torch.float32


def convolve(
    input: Tensor,
    conv: nn.Conv2d,
    bn: BatchNorm | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``conv(input)`` by one call of oneDNN, ``bn`` in its weights, then a ReLU or ``residual``.

    To be called where ``applies`` and ``runs_in_one_dnn``, with an ``input`` of the type to compute
    in and a ``residual`` of the result's shape and type.
    """
    # With a weight in its own layout oneDNN's result is channels_last, whatever the input.
    packs = memory_format_of(input) == torch.channels_last
    weight, bias = _parameters(conv, bn, input.dtype, tuple(input.shape) if packs else ())
    operands = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    output: Tensor
    if residual is None:
        output = torch.ops.mkldnn._convolution_pointwise(
            input, *operands, "relu" if relu else "none", [], ""
        )
    else:
        output = torch.ops.mkldnn._convolution_pointwise.binary(
            input, residual, *operands, "add", 1.0, None, [], None
        )
    return output


def folded_conv2d(input: Tensor, conv: nn.Conv2d, bn: BatchNorm, relu: bool) -> Tensor:
    """``bn(conv(input))``, with ``relu`` its ReLU: one convolution where nothing is differentiated.

    With gradients, in training and under torch.compile the three run as they are.
    """
    if not applies(input, (bn,)):
        output = conv(input)
        return fused_batch_norm_relu(bn, output) if relu else batch_norm(bn, output)
    dtype = checks.compute_type(conv.weight)
    input, padding = input.to(dtype), conv.padding
    if runs_in_one_dnn(input) and not isinstance(padding, str):
        return convolve(input, conv, bn, relu)
    weight, bias = _parameters(conv, bn, dtype, ())
    output = F.conv2d(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    return output.relu_() if relu else output
