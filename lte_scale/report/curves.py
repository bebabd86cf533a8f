"""The curves of a report: one plot per panel, drawn for a picture and for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from lte_scale.report.runs import Run

# Okabe and Ito's colours, told apart with any colour vision; from the seventh run on, another dash.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
THEMES = {
    "light": {"ink": "#22272e", "soft": "#6b7480", "grid": "#e6e9ed", "paper": "#ffffff"},
    "dark": {"ink": "#e3e7ec", "soft": "#96a0ac", "grid": "#2c333b", "paper": "#171b20"},
}
POINTS = 800
NONE = "-"


Style = Mapping[str, Any]
Styled = Sequence[tuple[Run, Style]]
FAINT = {"alpha": 0.25, "linewidth": 0.8}
HELD_OUT = {"marker": "o", "markersize": 4.0, "markerfacecolor": "none", "linewidth": 0.8, "linestyle": (0, (4, 2))}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
DOTS = {"linewidth": 1.1, "linestyle": (0, (1, 1.4))}


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the values, leaving out NaN."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curve(axes: Axes, run: Run, values: np.ndarray, style: Style, changes: Style | None = None) -> None:
    """Values over optimizer steps, thinned to what a panel can show."""
    shown = np.flatnonzero(np.isfinite(values))
    if len(shown) > POINTS:
        shown = shown[np.linspace(0, len(shown) - 1, POINTS).astype(int)]
    axes.plot(run.column("step")[shown], values[shown], **{**style, **(changes or {})})


def draw_loss(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("loss"), style, FAINT)
        curve(axes, run, smooth(run.column("loss")), style)
        curve(axes, run, run.column("eval_loss"), style, HELD_OUT)


def draw_accuracy(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, 100 * smooth(run.column("top1")), style)
        curve(axes, run, 100 * run.column("eval_top1"), style, HELD_OUT)


def draw_throughput(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("images_per_second"), style, FAINT)
        curve(axes, run, smooth(run.column("images_per_second")), style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(THOUSANDS)


def draw_bytes(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("inter_node_bytes"), style, {"drawstyle": "steps-post"})
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))


def draw_merge_seconds(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("merge_seconds"), style, {"drawstyle": "steps-post"})


def draw_rate_and_norm(axes: Axes, runs: Styled) -> None:
    right = axes.twinx()
    for run, style in runs:
        curve(axes, run, run.column("lr"), style)
        curve(right, run, smooth(run.column("grad_norm")), style, DOTS)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    right.set_ylim(bottom=0)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    right.grid(visible=False)


PANELS: tuple[tuple[str, str, Callable[[Axes, Styled], None]], ...] = (
    ("Loss", "training (line), held-out (circles)", draw_loss),
    ("Top-1 accuracy, %", "training (line), held-out (circles)", draw_accuracy),
    ("Throughput, images per second", "of the whole run", draw_throughput),
    ("Bytes between nodes", "sent by one node, cumulative", draw_bytes),
    ("Time in merges, seconds", "cumulative", draw_merge_seconds),
    ("Learning rate and gradient norm", "rate (left, line), norm (right, dots)", draw_rate_and_norm),
)


def styled(runs: Sequence[Run]) -> Styled:
    """Every run with its colour and dash, the same in all panels."""
    looks = [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(len(runs))]
    return [(run, {"color": c, "linestyle": d, "linewidth": 1.7}) for run, (c, d) in zip(runs, looks, strict=True)]


def theme(name: str) -> dict[Any, Any]:
    """matplotlib settings of the light or dark look."""
    look = THEMES[name]
    return {
        "figure.facecolor": look["paper"], "axes.facecolor": "none", "savefig.facecolor": look["paper"],
        "text.color": look["ink"], "axes.labelcolor": look["soft"], "axes.edgecolor": look["grid"],
        "xtick.color": look["soft"], "ytick.color": look["soft"], "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": look["grid"], "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.formatter.use_mathtext": True, "font.size": 9, "svg.hashsalt": "lte-scale",
    }  # fmt: skip


def draw(axes: Axes, plot: Callable[[Axes, Styled], None], runs: Sequence[Run]) -> None:
    """One panel without its title."""
    axes.margins(x=0.02)
    plot(axes, styled(runs))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    for each in axes.figure.axes:
        each.locator_params(axis="y", nbins=6)


def picture(runs: Sequence[Run]) -> bytes:
    """All panels as one PNG."""
    with mpl.rc_context(theme("light")):
        figure = Figure(figsize=(14, 7.6), dpi=150)
        grid = figure.subplots(2, 3)
        for axes, (title, subtitle, plot) in zip(grid.flat, PANELS, strict=True):
            draw(axes, plot, runs)
            axes.annotate(title, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=11, fontweight="bold")
            axes.annotate(subtitle, (0, 1), (0, 8), "axes fraction", "offset points", color=THEMES["light"]["soft"])
        for axes in grid[1]:
            axes.set_xlabel("optimizer step")
        handles = [Line2D([], [], label=run.label, **style) for run, style in styled(runs)]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.038, 0.995), ncols=6, frameon=False)
        figure.subplots_adjust(left=0.045, right=0.965, bottom=0.07, top=0.86, hspace=0.42, wspace=0.2)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def panel(plot: Callable[[Axes, Styled], None], runs: Sequence[Run], look: str) -> str:
    """One panel in one look as the data URI of an SVG image."""
    with mpl.rc_context(theme(look)):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.subplots()
        draw(axes, plot, runs)
        axes.set_xlabel("optimizer step")
        content = io.BytesIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
