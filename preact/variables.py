"""Environment variables that every call asks for."""

from __future__ import annotations

import os
from typing import Any

_NAMES = ("PREACT_BACKEND", "PREACT_PLAN", "PREACT_TUNE", "PREACT_SMALL_MAP")
_KEYS = tuple(map(os.environ.encodekey, _NAMES))


def state() -> tuple[object, ...]:
    """Their values just now, to be compared with earlier ones; None for one that is not set.

    ``os.environ.get`` raises and catches two exceptions for a variable that is not set, which for
    these takes a tenth of all that a remembered call does: what it reads is read as it lies there.
    """
    held: Any = getattr(os.environ, "_data", None)
    if held is None:
        return tuple(map(os.environ.get, _NAMES))
    backend, plan, tune, small = _KEYS
    return held.get(backend), held.get(plan), held.get(tune), held.get(small)
