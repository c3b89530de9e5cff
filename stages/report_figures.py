"""The report's plots: matplotlib SVGs that take their colours from CSS variables, so that one file is light and dark.

Deterministic: element ids come from a fixed salt, no date is written, text stays text. Standing alone
(`reports/figures/`) a figure carries its own palette for both schemes; inside the page it uses the page's.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Colours that matplotlib is given and no figure otherwise uses; each is replaced by its CSS variable.
INK, MUTED, LINE = "#0a0001", "#0a0002", "#0a0003"
SERIES = ("#0a0010", "#0a0011", "#0a0012", "#0a0013", "#0a0014", "#0a0015")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
STYLE = {
    "svg.hashsalt": "attention-from-scratch",
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": MUTED,
}


@dataclass(frozen=True)
class Series:
    """One line of a plot: y at x, with the least and greatest sample, and where it has one its limit."""

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    limit: Sequence[float | None] | None = None


@plt.style.context(["default", STYLE])
def plot_weeks(name: str, title: str, weeks: Sequence[str], labels: Sequence[str], series: Sequence[Series]) -> str:
    """A value by week, one line a series, on a log axis; bars are the range of samples, short dashes the limit.

    labels: what stands under each of `weeks`.
    """
    figure, axes = _axes(title, 4.4, len(series))
    for index, line in enumerate(series):
        colour, marker = SERIES[index % len(SERIES)], "os^Dvp"[index // len(SERIES) % 6]
        # A small sideways step keeps the bars of neighbours apart.
        x = [weeks.index(week) + (index - (len(series) - 1) / 2) * 0.07 for week in line.x]
        axes.plot(x, line.y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=line.label)
        if line.low is not None and line.high is not None:
            axes.vlines(x, line.low, line.high, color=colour, linewidth=3, alpha=0.45)
        for at, limit in zip(x, line.limit or [], strict=False):
            if limit is not None:
                axes.hlines(limit, at - 0.12, at + 0.12, color=colour, linewidth=1.4, linestyles=(0, (1.5, 1)))
    axes.set_xticks(range(len(weeks)), labels)
    axes.set_xlim(-0.5, len(weeks) - 0.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return _svg(figure, name, title)


@plt.style.context(["default", STYLE])
def plot_layers(name: str, title: str, ylabel: str, series: Sequence[Series], gate: float | None) -> str:
    """A value by layer, one line a series, with the gate it has to stay under."""
    figure, axes = _axes(title, 7.6, len(series))
    for index, line in enumerate(series):
        colour = SERIES[index % len(SERIES)]
        # Weeks often agree to the bit: an earlier one's larger marker shows behind a later one's.
        axes.plot(
            line.x,
            line.y,
            color=colour,
            marker="o",
            markersize=max(3, 8 - 2.5 * index),
            linewidth=1.3,
            label=line.label,
        )
    if gate is not None:
        axes.axhline(gate, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate(
            f"gate {gate:g}", (1, gate), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            ha="right", color=MUTED, fontsize=9,
        )  # fmt: skip
    axes.set_xlim(-0.5, max(max(line.x) for line in series) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer", labelpad=1)
    axes.set_ylabel(ylabel)
    _legend(axes)
    return _svg(figure, name, title)


def standalone(svg: str, palette: str) -> str:
    """`svg` with the CSS rules of `palette`, to be opened or embedded by itself."""
    return svg.replace(">", f"><style>{palette}</style>", 1) + "\n"


def _axes(title: str, width: float, count: int) -> tuple[Any, Any]:
    """A figure `width` inches wide with room below for the legend of `count` series."""
    columns = 2 if width < 6 else 4
    below = 0.58 + (0.17 * -(-count // columns) if count > 1 else 0)
    height = 2.5 + below
    figure, axes = plt.subplots(figsize=(width, height))
    # Fixed margins: a layout engine would measure every label, twice as slow.
    figure.subplots_adjust(left=0.52 / width, right=1 - 0.05 / width, bottom=below / height, top=1 - 0.28 / height)
    axes.set_title(title)
    return figure, axes


def _legend(axes: Any) -> None:
    """The legend under the axes, where there is more than one series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = 2 if axes.figure.get_figwidth() < 6 else 4
        axes.figure.legend(handles, labels, loc="lower left", ncols=columns, borderaxespad=0.1, borderpad=0.1)


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an <svg> element: colours as variables, ids its own, sized by its container."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    label = f' role="img" aria-label="{html.escape(title)}"'
    return re.sub(r' width="[^"]*" height="[^"]*"', label, svg, count=1)
