"""The report's plots: matplotlib SVGs that take their colours from CSS variables, so that one file is light and dark.

Deterministic: element ids come from a fixed salt, no date is written, text stays text. Standing alone
(`reports/figures/`) a figure carries its own palette for both schemes; inside the page it uses the page's.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Colours that matplotlib is given and no figure otherwise uses; each is replaced by its CSS variable.
INK, MUTED, LINE = "#0a0001", "#0a0002", "#0a0003"
SERIES = ("#0a0010", "#0a0011", "#0a0012", "#0a0013", "#0a0014", "#0a0015")
BAD = "#0a0004"
MARKERS = "os^Dvp"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NAMED = {INK: "ink", MUTED: "muted", LINE: "line", BAD: "bad"}
VARIABLES = NAMED | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
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
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": MUTED,
}


Grid = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Series:
    """One line of a plot: y at x, with the median's interval, and where it has one its limit."""

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    limit: Sequence[float | None] | None = None


@plt.style.context(["default", STYLE])
def plot_weeks(name: str, title: str, weeks: Sequence[str], labels: Sequence[str], series: Sequence[Series]) -> str:
    """A value by week, one line a series, on a log axis; bars are the interval of the median, short dashes the limit.

    labels: what stands under each of `weeks`.
    """
    figure, axes = _axes(title, 4.4, len(series))
    for index, line in enumerate(series):
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index // len(SERIES) % len(MARKERS)]
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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return _svg(figure, name, title)


@plt.style.context(["default", STYLE])
def plot_heat(name: str, title: str, lines: Sequence[str], columns: Sequence[str], shares: Grid) -> str:
    """A field a line and column, the darker the more of what is allowed is used; one beyond it has its own colour.

    shares: a line's values, None where there is none.
    """
    width, height = 7.6, 0.62 + 0.24 * len(lines)
    figure, axes = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(left=2.15 / width, right=1 - 0.05 / width, bottom=0.28 / height, top=1 - 0.3 / height)
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            if share is not None:
                colour, alpha = (BAD, 0.9) if share > 1 else (SERIES[5], 0.06 + 0.94 * share)
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=colour, alpha=alpha, linewidth=0))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(lines), 0)
    # Every fourth layer, and the first and last column.
    shown = [at for at, column in enumerate(columns) if column.isdigit() and not int(column) % 4]
    shown = [0, *shown[1:], len(columns) - 1]
    axes.set_xticks([at + 0.5 for at in shown], [columns[at] for at in shown], fontsize=8)
    axes.set_yticks([at + 0.5 for at in range(len(lines))], lines, fontsize=8.5)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, x=-2.1 / (width - 2.2))
    return _svg(figure, name, title)


@dataclass(frozen=True)
class Point:
    """A kernel under a roofline: FLOPs a byte (None where they are not counted) and the bytes a second it moves."""

    label: str
    group: str
    intensity: float | None
    bytes: float


EDGE = 0.2  # FLOP a byte, of kernels whose FLOPs are not counted


@plt.style.context(["default", STYLE])
def plot_roofline(name: str, title: str, points: Sequence[Point], bandwidth: float, matrix: float) -> str:
    """FLOP/s over FLOP a byte, both axes logarithmic; a colour a kernel, a marker a group."""
    labels = list(dict.fromkeys(point.label for point in points))
    groups = list(dict.fromkeys(point.group for point in points))
    figure, axes = _axes(title, 7.6, len(labels) + len(groups), plot=4.0)
    right = max(4 * matrix / bandwidth, 2 * max(point.intensity or 0 for point in points))
    edges = [EDGE / 1.6, matrix / bandwidth, right]
    axes.plot(edges, [min(x * bandwidth, matrix) for x in edges], color=INK, linewidth=1.3)
    turned = {"color": MUTED, "fontsize": 9, "textcoords": "offset points"}
    axes.annotate(f"{matrix / 1e12:.0f} TFLOP/s", (right, matrix), xytext=(0, 4), ha="right", **turned)
    axes.annotate(
        f"{bandwidth / 1e12:.2f} TB/s", (EDGE * 2, EDGE * 2 * bandwidth), xytext=(-6, 4), ha="right", **turned
    )
    for point in points:
        x = EDGE if point.intensity is None else point.intensity
        at = labels.index(point.label)
        # Twelve kernels and six colours: from the seventh on the markers are empty.
        colour, full = SERIES[at % len(SERIES)], at < len(SERIES)
        axes.plot(
            x, x * point.bytes, marker=MARKERS[groups.index(point.group) % len(MARKERS)], linestyle="", markersize=6,
            markerfacecolor=colour if full else "none", markeredgecolor=colour, markeredgewidth=1.2,
        )  # fmt: skip
    for at, label in enumerate(labels):
        colour, full = SERIES[at % len(SERIES)], at < len(SERIES)
        axes.plot([], [], "s", markersize=6, label=label, markeredgecolor=colour, markeredgewidth=1.2,
                  markerfacecolor=colour if full else "none")  # fmt: skip
    for at, group in enumerate(groups):
        axes.plot([], [], MARKERS[at % len(MARKERS)], markersize=5, color=MUTED, label=group)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(edges[0], right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
    axes.set_xlabel("FLOP for each byte", labelpad=1)
    axes.set_ylabel("FLOP/s")
    _legend(axes)
    return _svg(figure, name, title)


@dataclass(frozen=True)
class Bar:
    """A bar made of parts, from the left."""

    label: str
    parts: Mapping[str, float]


@plt.style.context(["default", STYLE])
def plot_bars(name: str, title: str, bars: Sequence[Bar]) -> str:
    """Bars below each other, a colour a part."""
    parts = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    figure, axes = _axes(title, 7.6, len(parts), plot=0.3 + 0.42 * len(bars), left=1.25, below=0.35)
    for y, bar in enumerate(bars):
        left = 0.0
        for at, part in enumerate(parts):
            size = bar.parts.get(part, 0.0)
            label = part if y == 0 else None
            axes.barh(y, size, left=left, height=0.62, color=SERIES[at % len(SERIES)], label=label, linewidth=0)
            left += size
        axes.annotate(f"{left:.3g}", (left, y), xytext=(4, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    _legend(axes)
    return _svg(figure, name, title)


def shorten(value: float) -> str:
    """A tick's number in few characters: "20k", "1T", "0.005"."""
    prefix = next(((size, name) for size, name in PREFIXES if value >= size), (1, ""))
    return f"{value / prefix[0]:g}{prefix[1]}"


def standalone(svg: str, palette: str) -> str:
    """`svg` with the CSS rules of `palette`, to be opened or embedded by itself."""
    return svg.replace(">", f"><style>{palette}</style>", 1) + "\n"


def _axes(
    title: str, width: float, count: int, plot: float = 2.5, left: float = 0.52, below: float = 0.58
) -> tuple[Any, Any]:
    """A figure `width` inches wide, its plot `plot` high, with room below for the legend of `count` series."""
    columns = 2 if width < 6 else 4
    below += 0.17 * -(-count // columns) if count > 1 else 0
    height = plot + below
    figure, axes = plt.subplots(figsize=(width, height))
    # Fixed margins: a layout engine would measure every label, twice as slow.
    figure.subplots_adjust(left=left / width, right=1 - 0.05 / width, bottom=below / height, top=1 - 0.28 / height)
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
