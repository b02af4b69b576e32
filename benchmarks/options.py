"""Options that the training commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from .data import DATA
from .recipe import TYPES

__all__ = ["recipe_fields", "run_options"]

_COUNT = click.IntRange(min=1)
_RECIPE = (
    click.option("--data", type=click.Choice(list(DATA)), help="Data set.  [digits if --quick]"),
    click.option("--iterations", type=_COUNT, help="[64000]"),
    click.option("--batch-size", type=click.IntRange(min=2), help="Of all processes.  [128]"),
    click.option("--accumulate", type=_COUNT, help="Parts of a batch.  [1]"),
    click.option("--learning-rate", type=float, help="[0.1]"),
    click.option(
        "--warm-up",
        type=click.IntRange(min=0),
        help="Iterations at a tenth of the rate.  [400 of 64000, in proportion]",
    ),
    click.option("--dtype", type=click.Choice(TYPES), help="bfloat16 is autocast.  [float32]"),
    click.option("--eager", is_flag=True, help="Eager PyTorch instead of the fused kernels."),
    click.option("--evaluate-every", type=_COUNT, help="Iterations.  [1000]"),
    click.option("--log-every", type=_COUNT, help="Iterations.  [100]"),
)
_RUN = (
    click.option(
        "--data-folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder that holds CIFAR as torchvision keeps it; nothing is downloaded.",
    ),
    click.option("--checkpoint-every", type=_COUNT, default=500, show_default=True),
    click.option(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True
    ),
    click.option("--threads", type=_COUNT, help="Threads of this process."),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with the options of a recipe and of how to run it, in this order in its help."""
    for option in reversed(_RECIPE + _RUN):
        command = option(command)
    return command


def recipe_fields(options: dict[str, Any], quick: dict[str, Any] | None) -> dict[str, Any]:
    """What was given, over what ``--quick`` stands for; raises where no data set was named."""
    given = {name: value for name, value in options.items() if value is not None}
    fields = {**(quick or {}), **given}
    if "data" not in fields:
        raise click.UsageError("--data is needed: " + ", ".join(DATA))
    return fields
