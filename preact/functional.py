"""Stateless functions: the contract on shapes, types and layouts.

Arguments stand in the order and under the names of ``torch.nn.functional.batch_norm`` and
``conv2d``. Everything a fused backend does not take (other ranks or types, empty batches, results
of ``torch.func`` transforms, residuals that broadcast) runs as eager PyTorch, with eager's result.
Invalid arguments raise what eager raises, before any running statistic is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autograd, backends, checks, identity_units, plans, prefix, remembered, units
from .arguments import Conv as Conv
from .arguments import Norm as Norm
from .arguments import Statistics as Statistics
from .checks import geometry_of as geometry_of
from .checks import output_shape as output_shape
from .running_stats import update_running_stats
from .serving import (
    backend_for,
    eager_conv,
    eager_norm,
    parameters_of,
    small,
    statistics_of,
    values_per_channel,
)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    statistics: Statistics | None = None,
) -> Tensor:
    """``relu(batch_norm(input))`` in one pass over memory, two with its own statistics.

    ``input`` is ``[N, C, H, W]`` in float32, float64, bfloat16 or float16, contiguous or
    channels_last; the result has its type and layout. In training the running statistics are
    updated in place. ``statistics`` are the mean and biased variance of ``input``, where another
    function already returned them.

    Raises ``ValueError`` for one value per channel in training and for a non-positive ``eps``,
    ``RuntimeError`` for a vector of the wrong length, type or device, and for running statistics
    that are absent in evaluation: what ``torch.nn.functional.batch_norm`` raises.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps)
    key = remembered.key_of(input, (norm,), (), statistics or (), batch_norm_relu)
    settings = remembered.known(key)
    if settings is None:
        checks.check_norm(input, norm)
        checks.check_statistics(input, statistics)
        backend = backend_for(input, [norm], (), batch_norm_relu, *norm, statistics=statistics)
        settings = prefix.decide(backend, input, norm)
        remembered.remember(key, settings)
    if settings.backend == "reference":
        if settings.small:
            small.count += 1
        return eager_norm(input, norm)
    mean, var = statistics_of(settings.backend, input, norm, statistics)
    output: Tensor
    if settings.differentiable:
        output = autograd.BatchNormReLU.apply(settings, input, mean, var, weight, bias)
    else:
        table = backends.table(settings.backend)
        output = prefix.activate(table, input, settings.norm(mean, var, weight, bias), input.dtype)
    if training:
        update_running_stats([norm], [(mean, var)], values_per_channel(input))
    return output


def batch_norm_relu_convs2d(
    input: Tensor,
    norm: Norm,
    convs: Sequence[Conv],
    *,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
    save_activation: bool = False,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Statistics | None]:
    """One BN-ReLU of ``input`` feeding every convolution in ``convs``.

    Returns the results, ``residual`` added to the first, and the statistics of that first one with
    ``return_statistics`` (None without, or where eager PyTorch ran). ``backend`` is that of the
    unit that this is a part of.
    """
    key = remembered.key_of(
        input, (norm,), convs, (residual, *(statistics or ())),
        batch_norm_relu_convs2d, return_statistics, save_activation, backend,
    )  # fmt: skip
    settings = remembered.known(key)
    if settings is None:
        settings = _checked_prefix(
            input, norm, convs, residual, statistics, return_statistics, save_activation, backend
        )
        remembered.remember(key, settings)
    if settings.backend == "reference":
        if settings.small:
            small.count += 1
        activation = eager_norm(input, norm)
        outputs = [eager_conv(activation, conv) for conv in convs]
        if residual is not None:
            outputs[0] = outputs[0] + residual
        return tuple(outputs), None
    mean, var = statistics_of(settings.backend, input, norm, statistics)
    parameters: list[Tensor | None] = []
    for conv, dtype in zip(convs, settings.dtypes, strict=True):
        parameters += parameters_of(conv, dtype)
    joined = residual if settings.joins else None
    found: Sequence[Tensor]
    if settings.differentiable:
        outputs = autograd.BatchNormReLUConv2d.apply(
            settings, input, mean, var, norm.weight, norm.bias, joined, *parameters
        )
        outputs, found = list(outputs[: len(convs)]), outputs[len(convs) :]
    else:
        outputs, found, _ = prefix.prefix_convolutions(
            settings.backend, input, settings.norm(mean, var, norm.weight, norm.bias),
            prefix.paired(parameters, settings.geometries), settings.fuses, joined,
            settings.statistics,
        )  # fmt: skip
    if residual is not None and joined is None:
        outputs[0] = outputs[0] + residual
    if norm.training:
        update_running_stats([norm], [(mean, var)], values_per_channel(input))
    return tuple(outputs), (found[0], found[1]) if found else None


def _checked_prefix(
    input: Tensor,
    norm: Norm,
    convs: Sequence[Conv],
    residual: Tensor | None,
    statistics: Statistics | None,
    return_statistics: bool,
    save_activation: bool,
    backend: str | None,
) -> prefix.Settings:
    """What is decided for ``batch_norm_relu_convs2d``; raises for whatever it cannot take."""
    checks.check_norm(input, norm)
    checks.check_statistics(input, statistics)
    for conv in convs:
        checks.check_conv(input, conv)
    geometries = [geometry_of(conv) for conv in convs]
    shape: tuple[int, ...] | None = None
    if residual is not None and geometries[0] is not None:
        shape = output_shape(input.shape, convs[0], geometries[0])
        checks.check_residual(residual, shape)
    if backend is None:
        backend = backend_for(
            input, [norm], convs, batch_norm_relu_convs2d, norm, tuple(convs), residual=residual,
            statistics=statistics, return_statistics=return_statistics,
            save_activation=save_activation,
        )  # fmt: skip
    joins = residual is not None and checks.same_kind(
        residual, shape or (), checks.compute_type(convs[0].weight)
    )
    return prefix.decide(
        "reference" if None in geometries else backend, input, norm, convs, geometries, residual,
        joins, return_statistics and (joins or residual is None), save_activation,
    )  # fmt: skip


def batch_norm_relu_conv2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
    save_activation: bool = False,
) -> Tensor | tuple[Tensor, Statistics | None]:
    """``conv2d(relu(batch_norm(input))) + residual``; see ``batch_norm_relu`` and ``conv2d``.

    Only ``input`` ``[N, C, H, W]``, vectors and weights are saved for backward, the activation with
    ``save_activation`` or in eager PyTorch. With ``return_statistics`` the result comes with its
    own ``Statistics`` for the next batch norm (None where eager PyTorch ran).

    Raises what ``torch.nn.functional.batch_norm`` and ``conv2d`` raise.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps)
    conv = Conv(conv_weight, conv_bias, stride, padding, dilation, groups)
    outputs, found = batch_norm_relu_convs2d(
        input, norm, [conv], residual=residual, statistics=statistics,
        return_statistics=return_statistics, save_activation=save_activation,
    )  # fmt: skip
    return (outputs[0], found) if return_statistics else outputs[0]


def identity_add(
    input: Tensor, other: Tensor, *, return_statistics: bool = False
) -> Tensor | tuple[Tensor, Statistics | None]:
    """``input + other``, the shortcut's addition (He et al. 2016, equation 1 with f the identity).

    With ``return_statistics``, one pass also yields the ``Statistics`` of the sum that the next
    unit's batch norm needs (None where eager PyTorch ran). Raises what ``+`` raises.
    """
    if not return_statistics:
        return input + other
    fusible = (
        input.dim() == 4
        and checks.same_kind(other, input.shape, input.dtype)
        and other.device == input.device
    )
    function = identity_add if fusible else None
    backend = backend_for(input, [], (), function, other, return_statistics=True)
    if backend == "reference" or not fusible:
        return input + other, None
    wanted = torch.is_grad_enabled() and (input.requires_grad or other.requires_grad)
    if wanted or remembered.carries_tangents():
        output, mean, var = autograd.IdentityAdd.apply(backend, input, other)
    else:
        output, mean, var = backends.table(backend).identity_add(input, other)
    return output, (mean, var)


def residual_unit(
    input: Tensor,
    layers: Sequence[tuple[Norm, Conv]],
    projection: Conv | None = None,
    *,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
    save_activation: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """A full pre-activation residual unit (He et al. 2016, figure 4e).

    ``input`` ``[N, C, H, W]`` runs through BN-ReLU-conv for each of ``layers``; added to that is
    ``input`` itself, or ``projection`` of the first activation where the unit changes dimensions.
    In backward the shortcut's gradient joins the first batch norm's own pass. Returns the sum and,
    with ``return_statistics``, its ``Statistics`` (None without, or where eager PyTorch ran).
    """
    return _residual_unit(
        input, layers, projection, statistics, return_statistics, save_activation
    )[:2]


def _residual_unit(
    input: Tensor,
    layers: Sequence[tuple[Norm, Conv]],
    projection: Conv | None,
    statistics: Statistics | None,
    return_statistics: bool,
    save_activation: bool,
) -> tuple[Tensor, Statistics | None, identity_units.Settings | units.Prepared]:
    """What ``residual_unit`` returns and what was decided of it."""
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])
    key = remembered.key_of(
        input, [norm for norm, _ in layers], convs, statistics or (), residual_unit, len(layers),
        return_statistics, save_activation,
    )  # fmt: skip
    prepared = remembered.known(key)
    if prepared is None:
        prepared = _checked_unit(
            input, layers, projection, convs, statistics, return_statistics, save_activation,
            key is not None,
        )  # fmt: skip
        remembered.remember(key, prepared)
    if isinstance(prepared, identity_units.Settings):
        first = statistics_of("cpp", input, layers[0][0], statistics)
        output, found = identity_units.run(input, layers, prepared, first, return_statistics)
    elif prepared is units.EAGER:
        output, found = units.run_eager(input, layers, projection), None
    elif prepared.settings is None:
        output = _unit_of_prefixes(
            input, layers, projection, statistics, save_activation, prepared.backend
        )
        found = None
    else:
        first = statistics_of(prepared.backend, input, layers[0][0], statistics)
        output, found = units.run(prepared, input, layers, projection, first)
    return output, found, prepared


def _checked_unit(
    input: Tensor,
    layers: Sequence[tuple[Norm, Conv]],
    projection: Conv | None,
    convs: Sequence[Conv],
    statistics: Statistics | None,
    return_statistics: bool,
    save_activation: bool,
    plain: bool,
) -> identity_units.Settings | units.Prepared:
    """What is decided for ``residual_unit``; raises for whatever it cannot take. ``plain`` calls
    are those that may be remembered."""
    checks.check_norm(input, layers[0][0])
    checks.check_statistics(input, statistics)
    if projection is not None:
        checks.check_conv(input, projection)
    geometries = [geometry_of(conv) for conv in convs]
    shapes = checks.layer_shapes(input, layers, geometries)
    types = {checks.compute_type(conv.weight) for conv in convs} | {input.dtype}
    backend = backend_for(
        input, [norm for norm, _ in layers], convs, residual_unit, tuple(layers), projection,
        statistics=statistics, return_statistics=return_statistics, save_activation=save_activation,
    )  # fmt: skip
    taken = [geometry for geometry in geometries if geometry is not None]
    if backend == "reference" or len(taken) < len(geometries) or len(types) > 1:
        return units.Prepared(backend, None)
    shortcut = tuple(input.shape)
    if projection is not None:
        shortcut = output_shape(input.shape, projection, taken[-1])
    if shortcut != shapes[-1]:
        return units.Prepared(backend, None)
    whole = plain and projection is None and not save_activation and backend == "cpp"
    settings = identity_units.settings_for(input, layers, taken) if whole else None
    if settings is not None:
        return settings
    prepared = units.prepare(
        backend, input, layers, projection, taken, shapes, save_activation, return_statistics
    )
    largest = max(map(math.prod, shapes[:-1]))
    is_small = not prepared.convolves and plans.is_too_small(backend, input, largest)
    return units.EAGER if is_small else prepared


def residual_units(
    input: Tensor,
    stage: Sequence[Sequence[tuple[Norm, Conv]]],
    *,
    statistics: Statistics | None = None,
    return_statistics: bool = False,
    ended: Callable[[int], None] = lambda index: None,
) -> tuple[Tensor, Statistics | None]:
    """``residual_unit`` of each of ``stage`` in turn, all around an identity shortcut.

    Each hands the statistics of its sum on to the next. Where the same call ran before and each
    unit was one op, all of them are. ``ended`` is called with each unit's index when its running
    statistics are up to date, so also for those before one that raises. Returns what the last unit
    returns.
    """
    layers = [layer for unit in stage for layer in unit]
    norms, convs = zip(*layers, strict=True)
    depths = tuple(map(len, stage))
    key = remembered.key_of(input, norms, convs, statistics or (), residual_units, depths)
    prepared = remembered.known(key)
    if prepared is not None:
        first = statistics_of("cpp", input, layers[0][0], statistics)
        result = identity_units.run(input, layers, prepared, first, return_statistics)
        for index in range(len(stage)):
            ended(index)
        return result
    found = []
    for index, unit in enumerate(stage):
        last = index + 1 == len(stage)
        returns = return_statistics if last else stage[index + 1][0][0].training
        input, statistics, prepared = _residual_unit(input, unit, None, statistics, returns, False)
        ended(index)
        if isinstance(prepared, identity_units.Settings):
            found.append(prepared)
    if len(found) == len(stage):
        remembered.remember(key, identity_units.joined(found))
    return input, statistics


def _unit_of_prefixes(
    input: Tensor,
    layers: Sequence[tuple[Norm, Conv]],
    projection: Conv | None,
    statistics: Statistics | None,
    save_activation: bool,
    backend: str,
) -> Tensor:
    """The unit layer by layer, for everything one fused unit does not take."""
    x, shortcut = input, input
    for index, (norm, conv) in enumerate(layers):
        convs = [conv] if index or projection is None else [conv, projection]
        (x, *projected), _ = batch_norm_relu_convs2d(
            x, norm, convs, statistics=statistics, save_activation=save_activation, backend=backend
        )
        shortcut = projected[0] if projected else shortcut
        statistics = None
    return x + shortcut
