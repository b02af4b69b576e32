"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .providers import BASELINE
from .rows import Row
from .timing import Spread

__all__ = ["case_table", "summary_table", "wide_console"]

NARROWEST = 150
_MIB = 2**20


def wide_console() -> Console:
    """The terminal; a file or a pipe has no width of its own, and tables must not be cut there."""
    console = Console()
    return console if console.is_terminal else Console(width=max(NARROWEST, console.width))


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median * 1e3:.1f} ({spread.low * 1e3:.1f}-{spread.high * 1e3:.1f})"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:.1f}"


def _plain(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _parity(row: Row) -> Text:
    if row.parity in ("FAILED", "error"):
        return Text(row.parity, style="bold red")
    if row.margin is None:
        return Text(row.parity)
    return Text(f"{row.parity} ({row.margin:.2f})", style="green")


def _name(row: Row) -> Text:
    return Text(f"{row.provider}, {row.layout}", style="bold" if row.best else "")


def case_table(title: str, rows: Sequence[Row]) -> Table:
    """All lanes of one case; the fastest layout of each provider is in bold."""
    compiled = any(row.compile_seconds is not None for row in rows)
    cells: list[tuple[str, Callable[[Row], str | Text]]] = [
        ("provider", _name),
        ("ms (p20-p80)", lambda row: _milliseconds(row.step)),
        ("vs eager (IQR)", lambda row: _ratio(row.speedup)),
        ("step / floor (IQR)", lambda row: _ratio(row.over_floor)),
        ("faults", lambda row: _plain(row.faults)),
        ("peak MiB", lambda row: _mebibytes(row.peak_bytes)),
        ("saved MiB", lambda row: _mebibytes(row.saved_bytes)),
        ("parity", _parity),
        ("note", lambda row: row.note),
    ]
    if compiled:
        cells.insert(3, ("vs compile (IQR)", lambda row: _ratio(row.against_compile)))
        cells.insert(-2, ("compile s", lambda row: _plain(row.compile_seconds, 1)))
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading, _ in cells:
        left = heading in ("provider", "parity", "note")
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=heading == "provider"
        )
    for row in rows:
        table.add_row(*(cell(row) for _, cell in cells))
    return table


def _share(mine: int | None, other: int | None) -> str:
    return f"{mine / other:.2f}" if mine is not None and other else ""


def summary_table(cases: Sequence[Sequence[Row]], provider: str) -> Table:
    """``provider`` in its fastest layout against the fastest of the others, one line a case."""
    table = Table(title=f"{provider}, best layout of each", title_justify="left")
    for heading in ("network", "type", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "ms",
        "vs eager (IQR)",
        "vs compile (IQR)",
        "step / floor",
        "eager / floor",
        "peak / eager",
        "saved / eager",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows in cases:
        best = {row.provider: row for row in rows if row.best}
        mine, eager = best.get(provider), best.get(BASELINE)
        if mine is None or eager is None:
            failed = next((r for r in rows if r.provider == provider), None)
            status = (failed or rows[0]).parity
            table.add_row(rows[0].network, rows[0].dtype, rows[0].mode, Text(status, "bold red"))
            continue
        table.add_row(
            mine.network,
            mine.dtype,
            mine.mode,
            _plain(mine.step.median * 1e3 if mine.step else None, 1),
            _ratio(mine.speedup),
            _ratio(mine.against_compile),
            _plain(mine.over_floor.median if mine.over_floor else None, 2),
            _plain(eager.over_floor.median if eager.over_floor else None, 2),
            _share(mine.peak_bytes, eager.peak_bytes),
            _share(mine.saved_bytes, eager.saved_bytes),
        )
    return table
