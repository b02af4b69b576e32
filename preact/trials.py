"""Times a convolution with its prefix both ways, ours and the library's, on tensors of its own."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, tuning
from . import device as devices

LARGEST = 8 << 20


class Problem(NamedTuple):
    """What a choice depends on; plain numbers."""

    work: str
    """"forward", "forward with statistics", "backward", or "pending": see ``plans``."""
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: str
    channels_last: bool
    device_type: str
    device_index: int | None
    threads: int = 0
    """Of a CPU, where its kernels are timed."""

    @property
    def device(self) -> torch.device:
        index = self.device_index
        return torch.device(self.device_type if index is None else f"{self.device_type}:{index}")

    def __str__(self) -> str:
        shape, weight = ("x".join(map(str, part)) for part in (self.input_shape, self.weight_shape))
        layout = "channels_last" if self.channels_last else "contiguous"
        extra = "" if self.groups == 1 else f" groups {self.groups}"
        stride = "" if max(self.stride) == 1 else f" stride {self.stride}"
        return f"{self.work} {shape} * {weight}{stride}{extra} {self.dtype} {layout}"


class Route(NamedTuple):
    own: bool


def capability(problem: Problem) -> int:
    """Of the problem's device, 90 for sm_90; where it is no GPU, what launchers assume."""
    return devices.properties(problem.device).capability


def of_sizes_on_cpu(problem: Problem) -> Problem:
    """The problem that stands for all of about these sizes, few enough to be timed quickly.

    Image sizes count to three binary digits, and images as far as ``LARGEST`` bytes of input go:
    enough to leave the second-level cache, as whole batches do.
    """
    batch, channels, *image = problem.input_shape
    image = [_rounded(size) for size in image]
    threads = torch.get_num_threads()
    each = channels * math.prod(image) * (4 if problem.dtype == "float32" else 2)
    most = max(1, LARGEST // (each * threads)) * threads
    return problem._replace(input_shape=(min(batch, most), channels, *image), threads=threads)


def _rounded(size: int) -> int:
    shift = max(0, size.bit_length() - 3)
    return (size + (1 << shift) // 2 >> shift) << shift


def fastest(
    problem: Problem, preferred: bool, backend: str = "triton", clearly: float = 1.0
) -> tuple[bool, bool]:
    """Whether our kernels are faster, and whether that was measured, now or earlier.

    ``preferred`` is the answer where nothing may be measured, or memory does not suffice, and where
    the other takes more than ``clearly`` of its time (on a CPU).
    """
    device = problem.device
    routes = (Route(preferred), Route(not preferred))
    trial: list[Trial] = []

    def run(route: Route) -> object:
        if not trial:
            trial.append(Trial(problem, device, backend))
        return trial[0].run(route.own)

    key = " ".join(str(part) for part in (*problem[1:9], *problem[11:]))
    op = f"plan {problem.work}"
    try:
        with torch.no_grad():
            if device.type == "cuda" or backend == "triton":
                chosen = tuning.select(op, key, routes, run, device)
            else:
                chosen = select_on_cpu(op, key, routes, run, clearly, PLANS)
    except torch.OutOfMemoryError:
        return preferred, False
    return chosen.own, tuning.is_known(op, key, device)


class Budget:
    """Seconds that a process may spend on measuring one kind of choice on its CPU."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, 0.0

    def left(self) -> float:
        return math.inf if tuning.setting() == "measure" else self.seconds - self.spent


PLANS = Budget(tuning.CPU_SECONDS)


def select_on_cpu(
    op: str,
    key: str,
    configs: Sequence[tuning.Config],
    run: Callable[[tuning.Config], object],
    clearly: float,
    budget: Budget,
) -> tuning.Config:
    """The first of ``configs``, unless another is clearly faster twice: a choice that flips from
    run to run would change how results are rounded."""
    device = torch.device("cpu")
    known = tuning.recall(op, key, configs, device)
    if known is not None or tuning.why_not(device) or budget.left() <= 0:
        return known or configs[0]
    start = time.perf_counter()
    chosen, considered = configs[0], list(configs)
    for _ in range(2):
        runs = [functools.partial(run, config) for config in considered]
        written, *others = tuning.measure(runs, device)
        best = min(range(len(others)), key=others.__getitem__)
        if others[best] >= clearly * written:
            chosen = configs[0]
            break
        chosen = considered[1 + best]
        considered = [configs[0], chosen]
    tuning.remember(op, key, chosen, device)
    budget.spent += time.perf_counter() - start
    return chosen


class Trial:
    """Operands for one problem, which nothing else holds; the random state stays as it is."""

    def __init__(self, problem: Problem, device: torch.device, backend: str = "triton") -> None:
        self.problem = problem
        self.table = backends.table(backend)
        generator = torch.Generator(device).manual_seed(0)
        dtype: torch.dtype = getattr(torch, problem.dtype)

        def make(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device).to(dtype)
            last = problem.channels_last and len(shape) == 4
            return values.contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )

        self.input, self.weight = make(*problem.input_shape), make(*problem.weight_shape)
        channels, outs = problem.input_shape[1], problem.weight_shape[0]
        ones, zeros = (torch.full((channels,), v, device=device) for v in (1.0, 0.0))
        self.vectors = (zeros, ones, ones, zeros, 1e-5)
        self.geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
        if "forward" in problem.work:
            return
        self.result = self.convolve(self.input)
        grad = torch.randn(self.result.shape, generator=generator, device=device).to(self.result)
        # A pending gradient is masked already, by a norm that changes no sign.
        self.grad = grad * (self.result > 0) if problem.work == "pending" else grad
        one, nought = (torch.full((outs,), v, device=device) for v in (1.0, 0.0))
        self.following = (nought, one, one, nought)

    def convolve(self, activation: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return torch.ops.aten.convolution.default(
            activation, self.weight, None, stride, padding, dilation, False, [0, 0], groups
        )

    def run(self, own: bool) -> Any:
        if self.problem.work == "pending":
            return self.run_pending(own)
        if self.problem.work == "backward":
            return self.run_backward(own)
        if own:
            return self.table.batch_norm_relu_conv2d(
                self.input, *self.vectors, self.weight, None, None, *self.geometry
            )
        output = self.convolve(self.table.batch_norm_relu(self.input, *self.vectors))
        with_statistics = self.problem.work != "forward"
        return self.table.batch_norm_stats(output) if with_statistics else output

    def run_backward(self, own: bool) -> Any:
        norm, eps = self.vectors[:4], self.vectors[4]
        if own:
            grad, *sums, _ = self.own_backward(self.grad)
        else:
            stride, padding, dilation, groups = self.geometry
            activation = self.table.batch_norm_relu(self.input, *self.vectors)
            grad, _, _ = torch.ops.aten.convolution_backward.default(
                self.grad, activation, self.weight, None, stride, padding, dilation, False, [0, 0],
                groups, [True, True, False],
            )  # fmt: skip
            sums = self.table.batch_norm_relu_backward_reduce(grad, self.input, *self.vectors)
        return self.table.batch_norm_relu_backward_apply(grad, self.input, *norm, *sums, None, eps)

    def run_pending(self, own: bool) -> Any:
        mean, var, weight, bias = self.following
        sums = (mean, mean)
        if own:
            coefficients = self.table.batch_norm_backward_coefficients(
                self.result, mean, var, weight, *sums, 1e-5
            )
            return self.own_backward(self.grad, self.result, coefficients)
        grad = self.table.batch_norm_relu_backward_apply(
            self.grad, self.result, mean, var, weight, bias, *sums, None, 1e-5
        )
        return self.own_backward(grad)

    def own_backward(self, grad: Tensor, *pending: Tensor) -> Any:
        return self.table.batch_norm_relu_conv2d_backward(
            grad, self.input, *self.vectors, self.weight, None, *self.geometry, *pending
        )
