"""A convolution with the batch norm behind it in its weights: for evaluation without gradients.

Nothing of the modules changes. The folded weights are kept beside them, made anew when a tensor
that they came from is another or has been written to, and are in no copy, pickle or state_dict.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .modules import batch_norm, fused_batch_norm_relu


class _Folded(NamedTuple):
    sources: tuple[tuple[Tensor | None, int, int], ...]
    """What the weights were made of: each tensor, how often it was written to, and its memory."""
    eps: float
    weight: Tensor
    bias: Tensor


_folded: WeakKeyDictionary[nn.Conv2d, _Folded] = WeakKeyDictionary()


def _state(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    if tensor is None:
        return None, 0, 0
    return tensor, 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _parameters(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias in ``dtype`` of the convolution that gives ``bn(conv(input))``."""
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    sources = tuple(map(_state, (conv.weight, conv.bias, bn.weight, bn.bias, mean, var)))
    known = _folded.get(conv)
    if (
        known is not None
        and known.eps == bn.eps
        and known.weight.dtype == dtype
        and all(
            new[0] is old[0] and new[1:] == old[1:]
            for new, old in zip(sources, known.sources, strict=True)
        )
    ):
        return known.weight, known.bias
    exact = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(var.to(exact) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(exact)
    bias = -mean.to(exact) if conv.bias is None else conv.bias.to(exact) - mean.to(exact)
    bias = bias * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(exact)
    weight = (conv.weight.to(exact) * scale.view(-1, 1, 1, 1)).to(dtype)
    _folded[conv] = _Folded(sources, bn.eps, weight, bias.to(dtype))
    return weight, _folded[conv].bias


def forget(model: nn.Module) -> None:
    """Drops the folded weights of ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _folded.pop(module, None)


def folded_conv2d(input: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool) -> Tensor:
    """``bn(conv(input))``, with ``relu`` its ReLU: one convolution where nothing is differentiated.

    With gradients, in training and under torch.compile the three run as they are.
    """
    if (
        torch.is_grad_enabled()
        or bn.training
        or bn.running_mean is None
        or bn.running_var is None
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or input.dim() != 4
    ):
        output = conv(input)
        return fused_batch_norm_relu(bn, output) if relu else batch_norm(bn, output)
    dtype = checks.compute_type(conv.weight)
    weight, bias = _parameters(conv, bn, dtype)
    input = input.to(dtype)
    padding = conv.padding
    one_dnn = (
        input.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and dtype in (torch.float32, torch.bfloat16)
        and not isinstance(padding, str)
        and input.numel() > 0
    )
    if relu and one_dnn:
        # oneDNN's convolution applies the ReLU to what it has just computed.
        return torch.ops.mkldnn._convolution_pointwise(
            input, weight, bias, padding, conv.stride, conv.dilation, conv.groups, "relu", [], ""
        )
    output = F.conv2d(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    return output.relu_() if relu else output
