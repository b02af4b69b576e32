"""Names with commas, as an option of the commands."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import click

__all__ = ["Choices"]


class Choices(click.ParamType[list[str]]):
    """A comma-separated list of names; "all" stands for every one."""

    name = "list"

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed

    def convert(
        self,
        value: str | Sequence[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> list[str]:
        if not isinstance(value, str):
            return list(value)
        if value == "all":
            return list(self.allowed)
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if name not in self.allowed:
                self.fail(f"unknown name {name!r}; known are {', '.join(self.allowed)}", param, ctx)
        return list(dict.fromkeys(names))
