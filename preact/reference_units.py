"""Formulas of identity units in sequence: those of ``reference`` in the order of the units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

TENSORS = 5
"""Of each layer in ``parameters``: mean, var, weight and bias of the norm, weight of the conv."""
NUMBERS = 7
"""Of each layer in ``geometries``: stride, padding, dilation (two each) and groups."""


def geometry_of(numbers: Sequence[int]) -> tuple[list[int], list[int], list[int], int]:
    return list(numbers[:2]), list(numbers[2:4]), list(numbers[4:6]), numbers[6]


def residual_units(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    geometries: Sequence[int],
    depth: int,
) -> list[Tensor]:
    """BN-ReLU-conv for each of ``depth`` layers, plus the unit's input, for each unit; the last
    sum, its mean and variance, and then input, mean and variance of each layer but the first.

    A layer whose mean and var are None takes its input's own statistics, the first must have them.
    Weights of convolutions may be of another type than ``input``, which is computed in.
    """
    x = shortcut = input
    found: list[Tensor] = []
    inner: list[Tensor] = []
    for index, one in enumerate(eps):
        mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
        if mean is None or var is None:
            mean, var = found[1:]
        assert conv is not None
        last = (index + 1) % depth == 0
        found = list(
            reference.batch_norm_relu_conv2d(
                x, mean, var, weight, bias, one, conv.to(input.dtype), None,
                shortcut if last else None,
                *geometry_of(geometries[NUMBERS * index : NUMBERS * (index + 1)]),
            )
        )  # fmt: skip
        x = found[0]
        if last:
            shortcut = x
        if index + 1 < len(eps):
            inner += found
    return [*found, *inner]


def residual_units_backward(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    batch_stats: Sequence[int],
    geometries: Sequence[int],
    depth: int,
) -> list[Tensor]:
    """Gradient of the first unit's input, then of each layer those of weight, bias and the conv's
    weight.

    ``inputs`` are the layers'; ``parameters`` hold every mean and var, ``batch_stats`` says which
    are the input's own. A parameter's gradient has its type.
    """
    grad = grad_sum = grad_output
    gradients: list[Tensor] = []
    pending: tuple[Tensor | None, Tensor | None] = (None, None)
    for index in reversed(range(len(eps))):
        mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
        assert mean is not None
        assert var is not None
        assert conv is not None
        x = inputs[index]
        grad_z, grad_weight, grad_bias, grad_conv = reference.batch_norm_relu_conv2d_backward(
            grad, x, mean, var, weight, bias, eps[index], conv, None,
            *geometry_of(geometries[NUMBERS * index : NUMBERS * (index + 1)]), *pending,
        )  # fmt: skip
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if batch_stats[index]:
            sums = (grad_weight, grad_bias)
        if index % depth > 0:
            grad = grad_z
            pending = (
                x,
                reference.batch_norm_backward_coefficients(x, mean, var, weight, *sums, eps[index]),
            )
        else:
            grad = grad_sum = reference.batch_norm_relu_backward_apply(
                grad_z, x, mean, var, weight, bias, *sums, grad_sum, eps[index]
            )
            pending = (None, None)
        gradients[:0] = [
            grad_weight if weight is None else grad_weight.to(weight.dtype),
            grad_bias if bias is None else grad_bias.to(bias.dtype),
            grad_conv,
        ]
    return [grad, *gradients]


def update_running_stats(
    running: Sequence[Tensor], batch: Sequence[Tensor], momenta: Sequence[float], count: int
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, in place, for each norm's mean and
    variance in turn; variances with ``count / (count - 1)``."""
    with torch.no_grad():
        unbiased = torch._foreach_mul(list(batch[1::2]), count / (count - 1))
        for momentum in dict.fromkeys(momenta):
            of_it = [index for index, one in enumerate(momenta) if one == momentum]
            old = [running[2 * index + part] for part in (0, 1) for index in of_it]
            new = [batch[2 * index] for index in of_it] + [unbiased[index] for index in of_it]
            same = [one.to(other.dtype) for one, other in zip(new, old, strict=True)]
            torch._foreach_lerp_(old, same, momentum)
