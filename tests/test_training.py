"""Whole networks: three steps fused and eager agree, and what is kept for backward is halved."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import preact
from preact import models

from .tolerances import EAGER_FACTOR, assert_same_in_float64, distance


def three_steps(
    model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, the gradients of every step and the final buffers, each as one vector."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dtype = next(model.parameters()).dtype
    losses, gradients = [], []
    with preact.use_backend(backend):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(dtype)), labels)
            loss.backward()
            losses.append(loss.detach())
            gradients += [p.grad.flatten().clone() for p in model.parameters()]
            optimizer.step()
    buffers = torch.cat([buffer.flatten().to(dtype) for buffer in model.buffers()])
    return torch.stack(losses), torch.cat(gradients), buffers


def network(
    name: str, layout: torch.memory_format
) -> tuple[torch.nn.Module, torch.nn.Module, list]:
    """A network as it is and as preact runs it, with the same weights, and three batches."""
    size = 32
    if name == "densenet121":
        torchvision = pytest.importorskip("torchvision")
        eager, size = torchvision.models.densenet121(num_classes=10), 64
    elif name == "small densenet":
        torchvision = pytest.importorskip("torchvision")
        eager, size = torchvision.models.DenseNet(16, (3, 4, 3), 32, num_classes=10), 64
    else:
        eager = models.preresnet20()
    eager = eager.to(memory_format=layout)
    fused = copy.deepcopy(eager)
    if "densenet" in name:
        report = preact.fuse_(fused)
        assert len(report.fused) >= (120 if name == "densenet121" else 20), report
    batches = [
        (
            torch.randn(4, 3, size, size).contiguous(memory_format=layout),
            torch.randint(0, 10, (4,)),
        )
        for _ in range(3)
    ]
    return eager, fused, batches


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["preresnet20", "densenet121"])
def test_three_steps_agree_in_float64(name, layout):
    """Losses, gradients and running statistics to rounding."""
    torch.manual_seed(0)
    eager, fused, batches = network(name, layout)
    results = [
        three_steps(eager.double(), batches, "reference"),
        three_steps(fused.double(), batches, "cpp"),
    ]
    for expected, found in zip(*results, strict=True):
        assert_same_in_float64(found, expected)


@pytest.mark.parametrize(("name", "runs"), [("preresnet20", 40), ("small densenet", 9)])
def test_three_steps_in_float32_are_as_near_to_float64_as_eagers(name, runs):
    """An element whose z rounds to the other side of zero changes a gradient by a whole term, in
    about every second run, in eager as in preact: the median of many runs is compared."""
    distances: dict[str, list[list[float]]] = {"reference": [], "cpp": []}
    for seed in range(runs):
        torch.manual_seed(seed)
        eager, fused, batches = network(name, torch.channels_last)
        exact = three_steps(copy.deepcopy(eager).double(), batches, "reference")
        for backend, model in (("reference", eager), ("cpp", fused)):
            found = three_steps(model, batches, backend)
            distances[backend].append([distance(a, b) for a, b in zip(found, exact, strict=True)])
    for part, (ours, eagers) in enumerate(
        zip(
            zip(*distances["cpp"], strict=True),
            zip(*distances["reference"], strict=True),
            strict=True,
        )
    ):
        allowed = EAGER_FACTOR * statistics.median(eagers) + 1e-6
        assert statistics.median(ours) <= allowed, (part, ours, eagers)


def bytes_kept(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes of distinct storages saved for backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("name", ["preresnet110", "preresnet164"])
def test_bytes_saved_for_backward_at_batch_128(name):
    model = getattr(models, name)().to(memory_format=torch.channels_last)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    fused = bytes_kept(model, images)
    with preact.use_backend("reference"):
        eager = bytes_kept(model, images)
    print(
        f"{name}: {fused / 2**20:.0f} MiB fused, {eager / 2**20:.0f} MiB eager, {fused / eager:.3f}"
    )
    assert fused <= 0.55 * eager
