"""Bar charts from a CSV: speed against eager, and distance from the conv floor.

``python -m benchmarks.plots FILE.csv`` draws them again from a stored file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .providers import BASELINE
from .rows import FLOOR, read_csv

__all__ = ["draw"]

Rows = Sequence[dict[str, str]]
# Colours of the Okabe-Ito set, told apart by colour-blind readers too.
_COLOURS = {"eager": "#999999", "compile": "#56B4E9", "preact": "#D55E00"}
_OTHER = "#009E73"


def _bars(axes: Axes, rows: Rows, figure: str, providers: Sequence[str]) -> None:
    """Horizontal bars of the column ``figure`` with its quartiles, a group a network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    height = 0.8 / max(1, len(providers))
    for offset, provider in enumerate(providers):
        found = {r["network"]: r for r in rows if r["provider"] == provider and r[figure]}
        places, middles, below, above = [], [], [], []
        for index, network in enumerate(networks):
            if network not in found:
                continue
            row = found[network]
            middle = float(row[figure])
            places.append(index + (offset - (len(providers) - 1) / 2) * height)
            middles.append(middle)
            below.append(max(0.0, middle - float(row[f"{figure}_q25"])))
            above.append(max(0.0, float(row[f"{figure}_q75"]) - middle))
        colour = _COLOURS.get(provider, _OTHER)
        axes.barh(places, middles, height * 0.92, color=colour, label=provider)
        axes.errorbar(
            middles, places, xerr=[below, above], fmt="none", ecolor="black", capsize=2, lw=1
        )
        for place, middle, reach in zip(places, middles, above, strict=True):
            axes.annotate(
                f"{middle:.2f}",
                (middle + reach, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.axvline(1.0, color="black", lw=1)
    axes.set_yticks(range(len(networks)), networks)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0.0)


def _chart(rows: Rows, figure: str, providers: Sequence[str], label: str, path: Path) -> None:
    """One panel for each mode and type, saved as a PNG."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    bars = len({row["network"] for row in rows}) * len(providers)
    canvas = Figure(
        figsize=(5.5 * len(dtypes), (1.3 + 0.3 * bars) * len(modes) + 0.8), layout="constrained"
    )
    panels = canvas.subplots(len(modes), len(dtypes), squeeze=False)
    for line, mode in zip(panels, modes, strict=True):
        for axes, dtype in zip(line, dtypes, strict=True):
            chosen = [row for row in rows if row["mode"] == mode and row["dtype"] == dtype]
            _bars(axes, chosen, figure, providers)
            axes.set_title(f"{mode}, {dtype}", fontsize=10)
            axes.set_xlabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    first = rows[0]
    threads = "" if first["device"] == "cuda" else f", {first['threads']} threads"
    canvas.suptitle(
        f"{first['hardware']}{threads}, torch {first['torch']}; best layout of each, quartiles",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    canvas.savefig(path, dpi=150)


def draw(path: Path) -> list[Path]:
    """Draw the charts of a CSV beside it and return their files; none if it holds no figures."""
    rows = [row for row in read_csv(path) if row["best"] == "True" and row["speedup"]]
    rows = [row for row in rows if row["provider"] != FLOOR]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    others = [name for name in providers if name != BASELINE]
    drawn = []
    if others:
        target = path.with_name(f"{path.stem}_speedup.png")
        _chart(rows, "speedup", others, "times as fast as the best eager", target)
        drawn.append(target)
    if providers:
        target = path.with_name(f"{path.stem}_floor.png")
        _chart(rows, "over_floor", providers, "step time / its convolutions alone", target)
        drawn.append(target)
    return drawn


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for result in draw(Path(name)):
            print(result)
