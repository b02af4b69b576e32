"""Who else watches a module's calls: what runs for it must then go through its ``__call__``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _module_globals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module."""

GLOBAL_HOOKS: tuple[Any, ...] = tuple(
    getattr(_module_globals, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its class's ``forward`` and nothing more."""
    own = module.__dict__
    return (
        not any(map(own.get, HOOKS))
        and not any(GLOBAL_HOOKS)
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
    )
