"""The dense block (Huang et al. 2017): all its features in one buffer, which no layer copies.

A layer is BN-ReLU-conv twice. It reads the features before it where they lie and writes its own
beside them, and their statistics, taken as they are written, serve every later layer. In backward a
layer adds ``scale * dz`` to the one gradient of the features; what batch statistics add to that is
linear in the features, ``slope * (x - mean) + offset``, the mean being the same in every layer: the
layers' coefficients are summed, and a feature's gradient is completed where it is read. Until then
it is kept in the accumulation type: rounding each sum would lose a part of what is not yet centred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, functional, plans
from .functional import Conv, Norm
from .plans import Geometry
from .prefix import Affine, cast_like, differentiable_backward, eager_prefix
from .reference import accumulate_dtype, memory_format_of, per_channel

DenseLayer = tuple[Norm, Conv, Norm, Conv]
Settings = tuple[tuple[tuple[float, float, bool, bool, Geometry, Geometry], ...], bool]
"""Of each layer both eps, whether each norm takes the batch's statistics, and both geometries; and
whether a backward may follow."""

_TENSORS = 10
"""Of each layer: weight, bias, mean, var of the first norm (mean and var None where they are the
batch's own), weight of the first convolution, and the same of the second."""


class DenseBlock(torch.autograd.Function):
    """All features ``[N, C + growths, H, W]``, their mean and variance, and those of each
    bottleneck; saves the features and the bottlenecks."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, input: Tensor, settings: Settings, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        table = backends.table(backend)
        layers, save = settings
        starts = _starts(input.size(1), parameters)
        format = memory_format_of(input)
        features = _map(input, starts[-1], format)
        features.narrow(1, 0, starts[0]).copy_(input)
        mean, var = input.new_zeros(2, starts[-1], dtype=accumulate_dtype(input.dtype)).unbind()
        if any(first for _, _, first, _, _, _ in layers):
            for whole, part in zip((mean, var), table.batch_norm_stats(input), strict=True):
                whole[: starts[0]] = part
        bottlenecks: list[Tensor] = []
        inner: list[Tensor] = []
        for index in range(len(layers)):
            norm, conv, second, next_conv = _layer(
                index, layers, starts, parameters, mean, var, inner
            )
            bottleneck = _map(input, conv[0].size(0), format)
            found = table.batch_norm_relu_conv2d_into(
                features.narrow(1, 0, starts[index]), *norm[:5], conv[0], *conv[1], bottleneck
            )
            inner += found
            if second.batch_stats:
                second = second._replace(mean=found[0], var=found[1])
            growth = slice(starts[index], starts[index + 1])
            mean[growth], var[growth] = table.batch_norm_relu_conv2d_into(
                bottleneck, *second[:5], next_conv[0], *next_conv[1], features[:, growth]
            )
            if save:
                bottlenecks.append(bottleneck)
        ctx.mark_non_differentiable(mean, var, *inner)
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(input, features, mean, var, *bottlenecks, *inner, *parameters)
        ctx.settings = (backend, layers)
        return (features, mean, var, *inner)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        backend, layers = ctx.settings
        count = len(layers)
        input, features, mean, var, *rest = ctx.saved_tensors
        bottlenecks, inner, parameters = rest[:count], rest[count : 3 * count], rest[3 * count :]
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * (3 + len(parameters))
        if torch.is_grad_enabled():
            found = differentiable_backward(
                lambda: [_eager_block(input, layers, parameters)],
                [grad_output],
                [input, *parameters],
            )
            return (None, found[0], None, *found[1:])

        table = backends.table(backend)
        starts = _starts(input.size(1), parameters)
        gradients: list[Tensor | None] = [None] * len(parameters)
        # What reads a feature after its layer is complete in `source` but for what `deferred` says.
        accumulate = accumulate_dtype(features.dtype)
        widens = accumulate != features.dtype
        grad_features = torch.empty_like(features, dtype=accumulate)
        if widens:
            source = grad_features.copy_(grad_output)
        else:
            source = grad_output.contiguous(memory_format=memory_format_of(features))
        deferred = torch.stack([torch.ones_like(mean), torch.zeros_like(mean), mean, mean * 0])
        anything_deferred = False
        for index in reversed(range(count)):
            norm, conv, second, next_conv = _layer(
                index, layers, starts, parameters, mean, var, inner
            )
            x = features.narrow(1, 0, starts[index])
            bottleneck = bottlenecks[index]
            growth = slice(starts[index], starts[index + 1])
            pending: tuple[Tensor | None, Tensor | None] = (None, None)
            if anything_deferred or widens:
                pending = (features[:, growth], deferred[:, growth])
            grad_z, *sums, grad_next = table.batch_norm_relu_conv2d_backward(
                source[:, growth], bottleneck, *second[:5], next_conv[0], None, *next_conv[1],
                *pending,
            )  # fmt: skip
            coefficients = table.batch_norm_backward_coefficients(
                bottleneck, *second[:3], *(sums if second.batch_stats else (None, None)), second.eps
            )
            *first_sums, grad_conv = table.batch_norm_relu_conv2d_backward_add(
                grad_z, x, *norm[:5], conv[0], *conv[1], bottleneck, coefficients,
                source.narrow(1, 0, starts[index]), grad_features.narrow(1, 0, starts[index]),
            )  # fmt: skip
            source = grad_features
            if norm.batch_stats:
                rows = table.batch_norm_backward_coefficients(x, *norm[:3], *first_sums, norm.eps)
                deferred[1::2, : starts[index]].add_(rows[1::2])
                anything_deferred = True
            at = _TENSORS * index
            gradients[at : at + _TENSORS] = (
                cast_like(first_sums[0], norm.weight), cast_like(first_sums[1], norm.bias),
                None, None, grad_conv,
                cast_like(sums[0], second.weight), cast_like(sums[1], second.bias),
                None, None, grad_next,
            )  # fmt: skip
        gradients = [
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[3:], strict=True)
        ]
        if not ctx.needs_input_grad[1]:
            return (None, None, None, *gradients)
        grad_input = source.narrow(1, 0, starts[0])
        if anything_deferred:
            _, slope, centre, offset = (per_channel(row, input) for row in deferred[:, : starts[0]])
            rest_of_it = (input - centre).mul_(slope).add_(offset)
            grad_input = rest_of_it.add_(grad_input)
        # Rounded once: what is to be added to a rounded gradient is less than its last place.
        grad_input = grad_input.to(input.dtype)
        format = memory_format_of(input)
        return (None, grad_input.contiguous(memory_format=format), None, *gradients)


def _map(like: Tensor, channels: int, format: torch.memory_format) -> Tensor:
    size = (like.size(0), channels, *like.shape[2:])
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


def _starts(first: int, parameters: Sequence[Tensor | None]) -> list[int]:
    """Where each layer's features begin, and at last how many there are."""
    starts = [first]
    for weight in parameters[_TENSORS - 1 :: _TENSORS]:
        assert weight is not None
        starts.append(starts[-1] + weight.size(0))
    return starts


_Convolution = tuple[Tensor, Geometry]


def _layer(
    index: int,
    layers: Sequence[tuple[float, float, bool, bool, Geometry, Geometry]],
    starts: Sequence[int],
    parameters: Sequence[Any],
    mean: Tensor,
    var: Tensor,
    inner: Sequence[Tensor],
) -> tuple[Affine, _Convolution, Affine, _Convolution]:
    """Norms and convolutions of one layer; ``mean`` and ``var`` are the features', ``inner`` those
    of the bottlenecks as far as they are known."""
    weight, bias, known_mean, known_var, conv, *second = parameters[
        _TENSORS * index : _TENSORS * (index + 1)
    ]
    eps, second_eps, batch_stats, second_stats, geometry, next_geometry = layers[index]
    if batch_stats:
        known_mean, known_var = mean[: starts[index]], var[: starts[index]]
    next_weight, next_bias, next_mean, next_var, next_conv = second
    if second_stats and len(inner) > 2 * index:
        next_mean, next_var = inner[2 * index : 2 * index + 2]
    return (
        Affine(known_mean, known_var, weight, bias, eps, batch_stats),
        (conv, geometry),
        Affine(next_mean, next_var, next_weight, next_bias, second_eps, second_stats),
        (next_conv, next_geometry),
    )


def _eager_block(
    input: Tensor,
    layers: Sequence[tuple[float, float, bool, bool, Geometry, Geometry]],
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """The block in operations autograd differentiates any number of times."""
    features = [input]
    starts = _starts(input.size(1), parameters)
    for index in range(len(layers)):
        norm, (conv, geometry), second, (next_conv, next_geometry) = _layer(
            index, layers, starts, parameters, input, input, ()
        )
        (bottleneck,) = eager_prefix(torch.cat(features, 1), norm, [(conv, None, geometry)])
        features += eager_prefix(bottleneck, second, [(next_conv, None, next_geometry)])
    return torch.cat(features, 1)


def is_fusible(input: Tensor, layers: Sequence[DenseLayer]) -> bool:
    """Whether ``dense_block`` takes these, and is the better way to run them."""
    if torch.compiler.is_compiling() or not layers or not isinstance(input, Tensor):
        return False
    norms = [norm for first, _, second, _ in layers for norm in (first, second)]
    convs = [conv for _, first, _, second in layers for conv in (first, second)]
    if input.dim() != 4 or functional.backend_for(input, norms) != "cpp":
        return False
    parameters = [t for norm in norms for t in (norm.weight, norm.bias) if t is not None]
    parameters += [conv.weight for conv in convs]
    trained = {parameter.requires_grad for parameter in parameters}
    if torch.is_grad_enabled() and trained != {True} and (input.requires_grad or True in trained):
        return False  # every gradient is computed here, also one that nobody asked for
    channels, work = input.size(1), "dense block"
    for conv in convs:
        geometry, weight, dtype = functional.geometry_of(conv), conv.weight, input.dtype
        shape = (input.size(0), weight.size(1), *input.shape[2:])
        if (
            conv.bias is not None
            or geometry is None
            or checks.compute_type(weight) != dtype
            or functional.output_shape(shape, conv, geometry)[2:] != tuple(input.shape[2:])
            or not plans.fuses_convolution("cpp", input, weight, geometry, work, dtype)
        ):
            return False
    for _, first, _, second in layers:
        if first.weight.size(1) != channels or second.weight.size(1) != first.weight.size(0):
            return False
        channels += second.weight.size(0)
    return True


def dense_block(input: Tensor, layers: Sequence[DenseLayer]) -> Tensor:
    """``input`` ``[N, C, H, W]`` and the features of every layer, concatenated along the channels.

    Each layer is norm, convolution, norm, convolution, and reads everything before it. To be called
    where ``is_fusible``. Raises what ``torch.nn.functional.batch_norm`` and ``conv2d`` raise.
    """
    batch, channels, *image = input.shape
    parameters: list[Tensor | None] = []
    for first, conv, second, next_conv in layers:
        checks.check_layer((batch, channels, *image), input, first, conv)
        checks.check_layer((batch, conv.weight.size(0), *image), input, second, next_conv)
        channels += next_conv.weight.size(0)
        for norm, its_conv in ((first, conv), (second, next_conv)):
            known = (None, None) if norm.training else (norm.running_mean, norm.running_var)
            conv_weight, _ = functional.parameters_of(its_conv)
            parameters += [norm.weight, norm.bias, *known, conv_weight]
    settings = (
        tuple(
            (
                first.eps, second.eps, first.training, second.training,
                functional.geometry_of(conv), functional.geometry_of(next_conv),
            )
            for first, conv, second, next_conv in layers
        ),
        torch.is_grad_enabled(),
    )  # fmt: skip
    output: Tensor
    backend = backends.choose(input.device.type)
    output, mean, var, *inner = DenseBlock.apply(backend, input, settings, *parameters)
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
    functional.update_all_running(trained, statistics, functional.values_per_channel(input))
    return output
