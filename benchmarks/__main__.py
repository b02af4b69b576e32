"""Command line: ``python -m benchmarks [COMMAND]``; a command lives in a file of its own."""

from __future__ import annotations

import os

# Read when torch loads the profiler, whose messages would cut through the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import click

from .breakdown import breakdown
from .compare import compare
from .faults import faults
from .memory_step import memory
from .race import race
from .signal import signal
from .streaming import streaming
from .study import study
from .traffic import traffic
from .train import train

DEFAULT = compare


class _Group(click.Group):
    """A group whose ``DEFAULT`` command takes every call that names no other."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [str(DEFAULT.name), *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Group)
def main() -> None:
    """Benchmarks of preact. Without the name of a command, "compare" runs."""


main.add_command(compare)
main.add_command(signal)
main.add_command(train)
main.add_command(study)
main.add_command(race)
main.add_command(memory)
main.add_command(traffic)
main.add_command(breakdown)
main.add_command(streaming)
main.add_command(faults)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
