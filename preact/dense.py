"""The dense block (Huang et al. 2017): all its features in one buffer, which no layer copies.

A layer is BN-ReLU-conv twice. It reads the features before it where they lie and writes its own
beside them, and their statistics, taken as they are written, serve every later layer. Forward and
backward are one op each, so that Python is not on the way between layers; ``reference_dense`` has
their formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, identity_units, plans, remembered, serving
from .arguments import Conv, Norm
from .prefix import Affine, differentiable_backward, eager_prefix
from .reference_units import NUMBERS, TENSORS, geometry_of
from .running_stats import running_statistics, update_running_stats

DenseLayer = tuple[Norm, Conv, Norm, Conv]


class Settings(NamedTuple):
    """Of both norms and convolutions of each layer in turn."""

    eps: tuple[float, ...]
    numbers: tuple[int, ...]
    """The convolutions' geometries, as the ops take them."""
    save: bool
    """Whether a backward may follow."""


class DenseBlock(torch.autograd.Function):
    """All features ``[N, C + growths, H, W]``, their mean and variance, and those of each
    bottleneck; saves the features and the bottlenecks.

    ``parameters`` holds mean, var, weight and bias of each norm and the weight of its convolution,
    which may be wider than ``input``, as under autocast; mean and var are None where they are the
    batch's own.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, settings: Settings, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        found = torch.ops.preact.dense_block(input, parameters, *settings)
        results: list[Tensor] = found[: 3 + len(settings.eps)]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        if settings.save:
            ctx.save_for_backward(input, *found, *parameters)
        ctx.settings = settings
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        eps, numbers, _ = settings = ctx.settings
        input, *found = ctx.saved_tensors
        count = TENSORS * len(eps)
        found, parameters = found[:-count], found[-count:]
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * (2 + count)
        if torch.is_grad_enabled():
            exact = differentiable_backward(
                lambda: [_eager_block(input, settings, parameters)],
                [grad_output],
                [input, *parameters],
            )
            return (exact[0], None, *exact[1:])
        grad_input, *of_parameters = torch.ops.preact.dense_block_backward(
            grad_output, found, parameters, eps, numbers, ctx.needs_input_grad[0]
        )
        gradients: list[Tensor | None] = [None] * count
        for index in range(len(eps)):
            at = TENSORS * index + 2
            gradients[at : at + 3] = of_parameters[3 * index : 3 * index + 3]
        gradients = [
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[2:], strict=True)
        ]
        return (grad_input if ctx.needs_input_grad[0] else None, None, *gradients)


def _eager_block(input: Tensor, settings: Settings, parameters: Sequence[Tensor | None]) -> Tensor:
    """The block in operations autograd differentiates any number of times."""
    features, x = [input], input
    for index, eps in enumerate(settings.eps):
        mean, var, weight, bias, conv = parameters[TENSORS * index : TENSORS * (index + 1)]
        assert conv is not None
        # Where they are the batch's own nobody reads them.
        unread = input if mean is None else mean
        norm = Affine(unread, unread if var is None else var, weight, bias, eps, mean is None)
        stride, padding, dilation, groups = geometry_of(
            settings.numbers[NUMBERS * index : NUMBERS * (index + 1)]
        )
        geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
        source = torch.cat(features, 1) if index % 2 == 0 else x
        (x,) = eager_prefix(source, norm, [(conv.to(input.dtype), None, geometry)])
        if index % 2:
            features.append(x)
    return torch.cat(features, 1)


def _halves(layers: Sequence[DenseLayer]) -> list[tuple[Norm, Conv]]:
    return [
        half
        for norm, conv, second, next_conv in layers
        for half in ((norm, conv), (second, next_conv))
    ]


def is_fusible(input: Tensor, layers: Sequence[DenseLayer]) -> bool:
    """Whether ``dense_block`` takes these, and is the better way to run them; remembered.

    Raises what ``torch.nn.functional.batch_norm`` and ``conv2d`` raise.
    """
    if not layers:
        return False
    key = remembered.key_of(input, *zip(*_halves(layers), strict=True), (), "dense block")
    if key is None:
        return False
    fusible: bool | None = remembered.known(key)
    if fusible is None:
        fusible = _decide(input, layers)
        if fusible:
            _check(input, layers)
        remembered.remember(key, fusible)
    return fusible


def _decide(input: Tensor, layers: Sequence[DenseLayer]) -> bool:
    norms = [norm for first, _, second, _ in layers for norm in (first, second)]
    convs = [conv for _, first, _, second in layers for conv in (first, second)]
    if input.dim() != 4 or serving.backend_for(input, norms) != "cpp":
        return False
    parameters = [t for norm in norms for t in (norm.weight, norm.bias) if t is not None]
    parameters += [conv.weight for conv in convs]
    trained = {parameter.requires_grad for parameter in parameters}
    if torch.is_grad_enabled() and trained != {True} and (input.requires_grad or True in trained):
        return False  # every gradient is computed here, also one that nobody asked for
    channels, work = input.size(1), "dense block"
    for conv in convs:
        geometry, weight, dtype = checks.geometry_of(conv), conv.weight, input.dtype
        shape = (input.size(0), weight.size(1), *input.shape[2:])
        if (
            conv.bias is not None
            or geometry is None
            or checks.compute_type(weight) != dtype
            or checks.output_shape(shape, conv, geometry)[2:] != tuple(input.shape[2:])
            or not plans.fuses_convolution("cpp", input, weight, geometry, work, dtype)
        ):
            return False
    for _, first, _, second in layers:
        if first.weight.size(1) != channels or second.weight.size(1) != first.weight.size(0):
            return False
        channels += second.weight.size(0)
    return True


def _check(input: Tensor, layers: Sequence[DenseLayer]) -> None:
    batch, channels, *image = input.shape
    for first, conv, second, next_conv in layers:
        checks.check_layer((batch, channels, *image), input, first, conv)
        checks.check_layer((batch, conv.weight.size(0), *image), input, second, next_conv)
        channels += next_conv.weight.size(0)


def dense_block(input: Tensor, layers: Sequence[DenseLayer]) -> Tensor:
    """``input`` ``[N, C, H, W]`` and the features of every layer, concatenated along the channels.

    Each layer is norm, convolution, norm, convolution, and reads everything before it. To be called
    where ``is_fusible``.
    """
    parameters: list[Tensor | None] = []
    eps: list[float] = []
    geometries: list[plans.Geometry] = []
    for norm, conv in _halves(layers):
        known = (None, None) if norm.training else running_statistics(norm)
        parameters += (*known, norm.weight, norm.bias, conv.weight)
        eps.append(norm.eps)
        geometry = checks.geometry_of(conv)
        assert geometry is not None
        geometries.append(geometry)
    numbers = identity_units.flattened(geometries)
    settings = Settings(tuple(eps), numbers, torch.is_grad_enabled())
    output: Tensor
    output, mean, var, *inner = DenseBlock.apply(input, settings, *parameters)
    trained: list[Norm] = []
    statistics: list[Sequence[Tensor]] = []
    for index, (first, conv, second, _) in enumerate(layers):
        read = conv.weight.size(1)
        if first.training:
            trained.append(first)
            statistics.append((mean[:read], var[:read]))
        if second.training:
            trained.append(second)
            statistics.append(inner[2 * index : 2 * index + 2])
    update_running_stats(trained, statistics, serving.values_per_channel(input))
    return output
