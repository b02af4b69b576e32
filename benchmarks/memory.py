"""Memory of one step: the highest number of bytes allocated, and the bytes kept for backward."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes", "saved_bytes"]


def peak_bytes(step: Callable[[], object], device_type: str) -> int:
    """The most bytes that ``step`` held at once, beyond what was allocated before it.

    On CUDA from the caching allocator. On the CPU from the allocations and frees that PyTorch's
    allocator reports to the profiler; memory that a library takes past that allocator (scratch of
    oneDNN) is not in it, for no provider.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # acc_events keeps PyTorch from warning about a behaviour that one cycle does not meet.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        ((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if _is_memory(e)),
    )
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _is_memory(event: dict[str, object]) -> bool:
    return event.get("name") == "[memory]"


def saved_bytes(step: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves for backward during ``step``.

    Parameters and buffers of ``module``, which exist anyway, are left out.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            # Kept, so that no later tensor can come to lie at the same address.
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())
