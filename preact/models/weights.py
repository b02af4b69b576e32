"""Weights under the key names of other PyTorch implementations.

| here | torchvision `resnet` | timm `resnetv2` | kuangliu `ResNet`, `PreActResNet` |
|---|---|---|---|
| `stem` | `conv1` | `stem.conv` | `conv1` |
| `stem_norm` | `bn1` | - | `bn1` |
| `stages.S.I.convJ` | `layer(S+1).I.convJ` | `stages.S.blocks.I.convJ` | `layer(S+1).I.convJ` |
| `stages.S.I.bnJ` | `layer(S+1).I.bnJ` | `stages.S.blocks.I.normJ` | `layer(S+1).I.bnJ` |
| `stages.S.I.shortcut` | - | `stages.S.blocks.I.downsample.conv` | `layer(S+1).I.shortcut.0` |
| `stages.S.I.shortcut.J` | `layer(S+1).I.downsample.J` | - | `layer(S+1).I.shortcut.J` |
| `norm` | - | `norm` | `bn` |
| `fc` | `fc` | `head.fc`, a 1x1 convolution | `linear` |

For equal results the networks must be the same, too. torchvision's are ``unit="original"``; timm's
``resnetv2_50`` and its like are ``stem_norm=False``; kuangliu's ``PreActResNet`` has neither the
activation before the first split nor the last one (``activate_before_split=False``,
``last_activation=False``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .preresnet import PreResNet

_UNIT = re.compile(r"stages\.(\d+)\.(\d+)\.(conv|bn|shortcut)\.?(\d*)\.(\w+)")


class _Names(NamedTuple):
    """Prefixes, with ``{stage}`` from 0, ``{next}`` from 1, and a layer's ``{number}``."""

    stem: str
    stem_norm: str
    unit: str
    conv: str
    bn: str
    shortcut: str
    norm: str
    fc: str


SOURCES = {
    "torchvision": _Names(
        "conv1", "bn1", "layer{next}.{unit}", "conv{number}", "bn{number}", "downsample.{number}",
        "norm", "fc",
    ),
    "timm": _Names(
        "stem.conv", "stem.norm", "stages.{stage}.blocks.{unit}", "conv{number}", "norm{number}",
        "downsample.conv", "norm", "head.fc",
    ),
    "kuangliu": _Names(
        "conv1", "bn1", "layer{next}.{unit}", "conv{number}", "bn{number}", "shortcut.{number}",
        "bn", "linear",
    ),
}  # fmt: skip


def _renamed(key: str, names: _Names) -> str:
    found = _UNIT.fullmatch(key)
    if found is None:
        head, tail = key.rsplit(".", 1)
        prefix: str = getattr(names, head)
        return f"{prefix}.{tail}"
    stage, unit, kind, number, tail = found.groups()
    pattern = f"{names.unit}.{getattr(names, kind)}.{tail}"
    return pattern.format(stage=stage, next=int(stage) + 1, unit=unit, number=number or 0)


def _names(source: str) -> _Names:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return SOURCES[source]


def export_weights(model: PreResNet, source: str) -> dict[str, Tensor]:
    """The model's ``state_dict`` under the names of ``source``: "torchvision", "timm", "kuangliu".

    The module's text has the mapping. Raises ``ValueError`` for another source, and for a model
    with gates, which none of them has.
    """
    names = _names(source)
    if any("weighing" in key for key in model.state_dict()):
        raise ValueError(f"{source} has no names for the weights of gates")
    renamed = {_renamed(key, names): value for key, value in model.state_dict().items()}
    if source == "timm":
        renamed["head.fc.weight"] = renamed["head.fc.weight"][:, :, None, None]
    return renamed


def load_weights(model: PreResNet, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load a ``state_dict`` written by an implementation that ``export_weights`` knows, in place.

    Raises ``RuntimeError``, as ``load_state_dict`` does, where a key or a shape does not fit.
    """
    _names(source)
    expected = export_weights(model, source)
    missing, unexpected = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    if missing or unexpected:
        raise RuntimeError(
            f"state_dict is not that of this network in {source}: missing {sorted(missing)[:5]},"
            f" unexpected {sorted(unexpected)[:5]}"
        )
    own = dict(zip(model.state_dict(), expected, strict=True))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict(
        {
            key: state_dict[theirs].reshape(shapes[key])
            if theirs.endswith("fc.weight")
            else state_dict[theirs]
            for key, theirs in own.items()
        }
    )
