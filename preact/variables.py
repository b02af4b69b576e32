"""Environment variables that every call asks for."""

from __future__ import annotations

import os

_ASKED = ("PREACT_BACKEND", "PREACT_PLAN", "PREACT_TUNE")
# What `os.environ` holds, by its own keys: asked for a variable that is not set, it raises and
# catches two exceptions, which between kernels takes as long as a fifth of all that a call checks.
_values = vars(os.environ).get("_data", os.environ)
_keys = [os.environ.encodekey(name) if _values is not os.environ else name for name in _ASKED]
_backend, _plan, _tune = _keys


def state() -> tuple[object, object, object]:
    """Values as they stand now, to compare with earlier ones: not set, a variable is None."""
    return _values.get(_backend), _values.get(_plan), _values.get(_tune)
