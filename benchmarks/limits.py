"""What a pass can take at least: the same op in its plainest loops, compiled where it runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

__all__ = ["operations"]

_SOURCE = Path(__file__).with_name("limits.cpp")
# PyTorch keeps one build for all its versions: it must be of the oldest.
_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", _ABI)
_TARGETS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


@functools.cache
def operations(capability: str) -> Any:
    """The ops of ``limits.cpp`` in vectors of ``capability``, that of preact's kernels; one set for
    a process. They are compiled at first use, which takes half a minute, and kept where PyTorch
    keeps such extensions. Raises what the build raises."""
    # Late: it takes a second, and other commands have no use for it.
    from torch.utils.cpp_extension import load

    target = _TARGETS.get(capability)
    load(
        f"preact_limits_{capability.lower()}",
        [str(_SOURCE)],
        extra_cflags=[*_FLAGS, *([f"-march={target}"] if target else [])],
        is_python_module=False,
    )
    return torch.ops.preact_limits
