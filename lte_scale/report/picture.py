"""The panels of a report as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lte_scale.report.curves import CURVES, Panel, Series, palette, panels, show_step, step_ticks
from lte_scale.report.runs import Run
from lte_scale.report.style import THEMES

DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
LOOK = THEMES["light"]
SETTINGS: dict[Any, Any] = {
    "figure.facecolor": LOOK["paper"], "axes.facecolor": "none", "savefig.facecolor": LOOK["paper"],
    "text.color": LOOK["ink"], "axes.labelcolor": LOOK["soft"], "axes.edgecolor": LOOK["grid"],
    "xtick.color": LOOK["soft"], "ytick.color": LOOK["soft"], "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LOOK["grid"], "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "font.size": 9,
}  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.7},
    "faint": {"linewidth": 0.8, "alpha": 0.25},
    "dotted": {"linewidth": 1.1, "linestyle": (0, (1, 1.4))},
    "marks": {"linestyle": "none", "marker": "o", "markersize": 4.0, "markerfacecolor": LOOK["paper"]},
}
COLUMNS = 3


def picture(runs: Sequence[Run]) -> bytes:
    """The curves of the runs, three in a row."""
    shown = panels(CURVES, runs)
    rows = max(1, -(-len(shown) // COLUMNS))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(14, 0.8 + 3.4 * rows), dpi=150)
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, panel in zip(grid, shown, strict=False):
            _draw(axes, panel)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        handles = [
            Line2D([], [], label=run.label, color=colour, linestyle=DASHES[dash % len(DASHES)])
            for run, colour, dash in palette(runs)
        ]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.038, 0.995), ncols=6, frameon=False)
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.045, right=0.985, bottom=0.55 / height, top=1 - 1.05 / height, hspace=0.42, wspace=0.2
        )
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        _line(axes, series)
    axes.set_xlim(0, 1.01 * panel.last_step)
    axes.set_ylim(*panel.range())
    axes.set_xticks(step_ticks(panel.last_step), [show_step(tick) for tick in step_ticks(panel.last_step)])
    axes.set_yticks(panel.ticks(), [panel.show(tick) for tick in panel.ticks()])
    axes.set_xlabel("optimizer step")
    axes.annotate(panel.title, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=11, fontweight="bold")
    axes.annotate(panel.subtitle, (0, 1), (0, 8), "axes fraction", "offset points", color=LOOK["soft"])


def _line(axes: Axes, series: Series) -> None:
    dash = {"linestyle": DASHES[series.dash % len(DASHES)]} if series.look == "line" else {}
    axes.plot(series.steps, series.values, **{"color": series.colour, **LINES[series.look], **dash})
