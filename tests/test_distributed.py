"""Two processes with half a batch each are one process with all of it, norms synchronised."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import preact
from preact.backends import available
from preact.calls import norm_arguments
from preact.models import UNITS, PreResNet
from preact.synchronised import synchronised_norm

from .test_identity_units import Calls
from .test_training import three_steps
from .tolerances import assert_same_in_float64

pytestmark = pytest.mark.skipif(
    not dist.is_available() or available()["cpp"] != "",
    reason="no torch.distributed, or no native kernels",
)

PROCESSES = 2


def networks() -> dict[str, nn.Module]:
    """Every order of activation, basic and bottleneck, and a loose ``BatchNormReLU2d``."""
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {}
    for unit in UNITS:
        layers = "bottleneck" if unit == "full_preactivation" else "basic"
        found[unit] = PreResNet(layers, [1, 1], [4, 8], 10, stem_channels=4, unit=unit)
    found["modules"] = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), preact.BatchNormReLU2d(4, momentum=None),
        preact.PreActBasicBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    return {name: model.double() for name, model in found.items()}


def batches() -> list[tuple[Tensor, Tensor]]:
    """A mean far from zero, so that statistics of half a batch would show."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1, 7).view(6, 1, 1, 1)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator) * scale + scale,
            torch.randint(0, 10, (6,), generator=generator),
        )
        for _ in range(3)
    ]


def halves(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(part.chunk(PROCESSES)[rank] for part in batch) for batch in batches()]  # type: ignore[misc]


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    results: dict[str, Any] = {}
    for backend in ("reference", "cpp"):
        for name, model in networks().items():
            # Losses are this process's own; gradients are averaged, buffers must be the same.
            results[name, backend] = three_steps(
                DistributedDataParallel(preact.convert_sync_batchnorm(model)), halves(rank), backend
            )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # lest one takes its connections down while the other still uses them
    dist.destroy_process_group()
    # In one of some fifty runs a process ended by SIGABRT, "terminate called without an active
    # exception", barrier or not: no interpreter is taken down beside threads of the group.
    os._exit(0)


def test_two_processes_equal_one_at_twice_the_batch(tmp_path: Path) -> None:
    mp.spawn(one_process, (str(tmp_path),), nprocs=PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for name, model in networks().items():
        losses, gradients, buffers = three_steps(model, batches(), "reference")
        for backend in ("reference", "cpp"):
            own = [rank[name, backend] for rank in ranks]
            assert_same_in_float64(sum(part[0] for part in own) / PROCESSES, losses)
            for part in own:
                assert_same_in_float64(part[1], gradients)
                assert_same_in_float64(part[2], buffers)


def test_conversion_keeps_the_activation_and_the_state() -> None:
    """Alone, a converted network is what it was, after torch's own conversion of units as well."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for name, model in networks().items():
        convert = preact.convert_sync_batchnorm
        if name in UNITS:
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
        converted = convert(copy.deepcopy(model))
        norms = [m for m in converted.modules() if isinstance(m, _BatchNorm)]
        assert norms
        assert all(hasattr(norm, "process_group") for norm in norms)
        assert list(converted.state_dict()) == list(model.state_dict())
        for training in (True, False):
            model.train(training), converted.train(training)
            assert_same_in_float64(converted(x), model(x))


def test_the_report_on_synchronised_norms() -> None:
    model = preact.convert_sync_batchnorm(PreResNet("basic", [1, 1], [4, 8], 10, stem_channels=4))
    report = preact.fuse_(model)
    assert len(report.fused) == 5
    assert not report.skipped


def test_running_statistics_are_brought_up_to_date_in_the_one_way(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 5, 5)
    bn, expected = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    bn.process_group = None
    before = bn.running_mean._version
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with Calls() as calls:
            synchronised_norm(bn, x, norm_arguments(bn, x))
    finally:
        dist.destroy_process_group()
    expected(x)
    assert calls.names.count("update_running_stats") == 1
    assert bn.running_mean._version == before + 1
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(bn, name), getattr(expected, name))
