"""The pieces every Function is made of: one BN-ReLU feeding convolutions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, plans
from .arguments import Conv, Norm
from .checks import compute_type
from .plans import Geometry
from .remembered import Kept, carries_tangents

_NO_OUTPUT_PADDING = (0, 0)


class Affine(NamedTuple):
    """What normalises one input: statistics ``[C]``, parameters ``[C]``, eps, whose statistics."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch_stats: bool


class Settings(NamedTuple):
    """What is decided of a prefix before it runs, and is the same whatever its tensors hold."""

    backend: str
    eps: float
    batch_stats: bool
    geometries: tuple[Geometry, ...]
    fuses: tuple[bool, ...]
    """Of each convolution whether its forward runs in a kernel of our own."""
    dtypes: tuple[torch.dtype, ...]
    """That each convolution computes in."""
    joins: bool
    """Whether a residual is added within, to the first result."""
    statistics: bool
    """Whether those of the first result are returned."""
    keeps_activation: bool
    differentiable: bool
    """Whether somebody may ask for a gradient."""
    backward: Kept[tuple[bool, ...]]
    """Of each convolution whether its backward runs in a kernel of our own."""
    small: bool
    """Whether eager PyTorch runs because it is faster."""

    def norm(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
        return Affine(mean, var, weight, bias, self.eps, self.batch_stats)


def decide(
    backend: str,
    input: Tensor,
    norm: Norm,
    convs: Sequence[Conv] = (),
    geometries: Sequence[Geometry | None] = (),
    residual: Tensor | None = None,
    joins: bool = False,
    return_statistics: bool = False,
    save_activation: bool = False,
) -> Settings:
    """The settings of a prefix whose arguments were checked."""
    taken = tuple(geometry for geometry in geometries if geometry is not None)
    dtypes = tuple(compute_type(conv.weight) for conv in convs)
    fuses: tuple[bool, ...] = ()
    small = False
    if backend != "reference":
        weights = [conv.weight for conv in convs]
        described = list(zip(weights, taken, dtypes, strict=True))
        fuses = fused_forward(backend, input, norm.training, described, joins)
        small = not any(fuses) and plans.is_too_small(backend, input, input.numel())
        if small:
            backend, fuses = "reference", ()
    tensors = [input, norm.weight, norm.bias, residual, *(t for conv in convs for t in conv[:2])]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return Settings(
        backend, norm.eps, norm.training, taken, fuses, dtypes, joins, return_statistics,
        plans.keeps_activation(save_activation),
        (torch.is_grad_enabled() and wanted) or carries_tangents(), Kept(), small,
    )  # fmt: skip


def activate(table: Any, input: Tensor, norm: Affine, dtype: torch.dtype) -> Tensor:
    activation = table.batch_norm_relu(input, norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
    return activation if activation.dtype == dtype else activation.to(dtype)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(
        input, weight, bias, stride, padding, dilation, False, _NO_OUTPUT_PADDING, groups
    )


def convolve_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, those that ``mask`` asks for."""
    stride, padding, dilation, groups = geometry
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, [weight.size(0)] if mask[2] else None, stride, padding,
        dilation, False, [0, 0], groups, mask,
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias


def cast_like(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in the type of what it belongs to."""
    if gradient is None or like is None or gradient.dtype == like.dtype:
        return gradient
    return gradient.to(like.dtype)


class Needs(NamedTuple):
    """Which gradients one prefix has to give."""

    input: bool
    norm: bool
    convs: list[tuple[bool, bool]]  # weight, bias

    @property
    def activation(self) -> bool:
        """Whether the convolutions have to give gradients of their input."""
        return self.input or self.norm


class Pending(NamedTuple):
    """The gradient of a batch norm's input, its last step left to the convolution that reads it."""

    grad_z: Tensor
    input: Tensor
    coefficients: Tensor


class PrefixGradients(NamedTuple):
    input: Tensor | Pending | None
    weight: Tensor | None
    bias: Tensor | None
    convs: list[tuple[Tensor | None, Tensor | None]]


def fused_forward(
    backend: str,
    input: Tensor,
    batch_stats: bool,
    convs: Sequence[tuple[Tensor, Geometry, torch.dtype]],
    adds: bool,
) -> tuple[bool, ...]:
    """Which of a prefix's convolutions run in kernels of our own in forward, from their weights,
    geometries and the types they compute in; whether a residual is added to the first."""
    works = ["forward with statistics" if batch_stats else "forward"] * len(convs)
    if adds and not batch_stats:
        works[0] = "forward with residual"
    return tuple(
        plans.fuses_convolution(backend, input, weight, geometry, work, dtype)
        for (weight, geometry, dtype), work in zip(convs, works, strict=True)
    )


def paired(
    parameters: Sequence[Tensor | None], geometries: Sequence[Geometry]
) -> list[tuple[Tensor, Tensor | None, Geometry]]:
    """Weight, bias and geometry of each convolution whose weights and biases stand in turn."""
    convs = []
    for index, geometry in enumerate(geometries):
        weight, bias = parameters[2 * index : 2 * index + 2]
        assert weight is not None
        convs.append((weight, bias, geometry))
    return convs


def prefix_convolutions(
    backend: str,
    input: Tensor,
    norm: Affine,
    convs: Sequence[tuple[Tensor, Tensor | None, Geometry]],
    fuses: Sequence[bool],
    residual: Tensor | None,
    statistics: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
    """One BN-ReLU feeding ``convs``, ``residual`` added to the first.

    ``fuses`` is what ``fused_forward`` found. Returns the results, mean and variance of the first
    with ``statistics``, and the activation, None where every convolution was fused and it was never
    written.
    """
    table = backends.table(backend)
    activation: Tensor | None = None
    outputs: list[Tensor] = []
    found: tuple[Tensor, ...] = ()
    vectors = (norm.mean, norm.var, norm.weight, norm.bias)
    for index, (weight, bias, geometry) in enumerate(convs):
        added = residual if index == 0 else None
        found_here: list[Tensor] = []
        if fuses[index]:
            inside = added if added is not None and plans.adds_in_epilogue() else None
            output, *found_here = table.batch_norm_relu_conv2d(
                input, *vectors, norm.eps, weight, bias, inside, *geometry
            )
            added = None if inside is not None else added
        else:
            if activation is None:
                activation = activate(table, input, norm, weight.dtype)
            output = convolve(activation, weight, bias, geometry)
            if added is None and index == 0 and statistics:
                found_here = list(table.batch_norm_stats(output))
        if added is not None and statistics:
            output, *found_here = table.identity_add(output, added)
        elif added is not None:
            output = output + added
        if index == 0 and statistics:
            found = tuple(found_here)
        outputs.append(output)
    return outputs, found, activation


def prefix_backward(
    backend: str,
    input: Tensor,
    norm: Affine,
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
    fuses: Sequence[bool],
    grad_outputs: Sequence[Tensor | Pending | None],
    activation: Tensor | None,
    grad_skip: Tensor | None,
    needs: Needs,
    leave_pending: bool = False,
) -> PrefixGradients:
    """Backward of one BN-ReLU feeding ``weights``; ``grad_skip`` joins the gradient of ``input``.
    ``fuses`` is what ``fused_backward`` found.

    The library's convolutions give their gradients in one call each: a second call costs the set-up
    and the reorders again, more than the pass that computing activation and sums together would
    save. Fused ones come after them and take what they found on the way. With ``leave_pending``
    the gradient of ``input`` is returned ``Pending`` where it can be.
    """
    table = backends.table(backend)
    vectors = (norm.mean, norm.var, norm.weight, norm.bias)
    reduce = needs.norm or (needs.input and norm.batch_stats)
    wants_input = needs.activation

    grad_activation: Tensor | None = None
    convs: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(weights)
    fused: list[int] = []
    for index, (weight, geometry, grad) in enumerate(
        zip(weights, geometries, grad_outputs, strict=True)
    ):
        wants_weight, wants_bias = needs.convs[index]
        if grad is None or not (wants_input or wants_weight or wants_bias):
            continue
        if fuses[index]:
            fused.append(index)
            continue
        assert isinstance(grad, Tensor)
        if activation is None and wants_weight:
            activation = activate(table, input, norm, weight.dtype)
        # Where no weight needs a gradient the convolution reads only the shape of its input.
        source = input if activation is None else activation
        part, *of_parameters = convolve_backward(
            grad,
            source if source.dtype == weight.dtype else source.to(weight.dtype),
            weight,
            geometry,
            [wants_input, wants_weight, wants_bias],
        )
        convs[index] = (of_parameters[0], of_parameters[1])
        if part is not None:
            grad_activation = part if grad_activation is None else grad_activation + part
    grad_activation = cast_like(grad_activation, input)

    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    for index in fused:
        grad = grad_outputs[index]
        pending: Sequence[Tensor | None] = (None, None)
        if isinstance(grad, Pending):
            grad, *pending = grad
        assert grad is not None
        of_bias = grad.sum((0, 2, 3)) if needs.convs[index][1] else None
        # The mask leaves a masked gradient as it is: each convolution adds to what the last masked.
        grad_activation, grad_weight, grad_bias, of_weight = table.batch_norm_relu_conv2d_backward(
            grad, input, *vectors, norm.eps, weights[index], grad_activation, *geometries[index],
            *pending,
        )  # fmt: skip
        convs[index] = (of_weight, of_bias)
    if grad_activation is not None and reduce and grad_weight is None:
        grad_weight, grad_bias = table.batch_norm_relu_backward_reduce(
            grad_activation, input, *vectors, norm.eps
        )

    grad_input: Tensor | Pending | None = grad_skip if needs.input else None
    if grad_activation is not None and needs.input:
        sums = (grad_weight, grad_bias) if norm.batch_stats else (None, None)
        if leave_pending and fused and grad_skip is None:
            coefficients = table.batch_norm_backward_coefficients(
                input, norm.mean, norm.var, norm.weight, *sums, norm.eps
            )
            grad_input = Pending(grad_activation, input, coefficients)
        else:
            grad_input = table.batch_norm_relu_backward_apply(
                grad_activation, input, *vectors, *sums, cast_like(grad_skip, input), norm.eps
            )
    return PrefixGradients(grad_input, grad_weight, grad_bias, convs)


def fused_backward(
    backend: str,
    input: Tensor,
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
    needs: Needs,
) -> tuple[bool, ...]:
    """Which of a prefix's convolutions run fused in backward: those give both gradients."""
    fuses = []
    for weight, geometry, (of_weight, _) in zip(weights, geometries, needs.convs, strict=True):
        both = needs.activation and of_weight
        fuses.append(both and plans.fuses_convolution(backend, input, weight, geometry, "backward"))
    return tuple(fuses)


def eager_prefix(
    input: Tensor, norm: Affine, convs: Sequence[tuple[Tensor, Tensor | None, Geometry]]
) -> list[Tensor]:
    """The prefix in operations autograd differentiates any number of times."""
    mean, var = (None, None) if norm.batch_stats else (norm.mean, norm.var)
    activation = F.relu(
        F.batch_norm(
            input, mean, var, norm.weight, norm.bias, training=norm.batch_stats, eps=norm.eps
        )
    )
    return [
        convolve(activation.to(weight.dtype), weight, bias, geometry)
        for weight, bias, geometry in convs
    ] or [activation]


def differentiable_backward(
    forward: Callable[[], Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``forward()`` for ``inputs`` that carry a graph of their own."""
    with torch.enable_grad():
        pairs = [
            (output, grad)
            for output, grad in zip(forward(), grad_outputs, strict=True)
            if grad is not None
        ]
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
    gradients = iter(found)
    return [
        next(gradients) if tensor is not None and tensor.requires_grad else None
        for tensor in inputs
    ]
