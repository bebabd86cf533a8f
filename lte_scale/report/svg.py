"""A panel as SVG in the page. Text keeps its size and lines their width however wide the panel is shown."""

from __future__ import annotations

import html
from collections.abc import Callable

import numpy as np

from lte_scale.report.curves import Panel, Series, show_step, step_ticks

# The curves are in a square of this side that is stretched to the panel; all else is placed in percent.
SIDE = 1000
DASHES = ("", "7 3", "2 3", "8 3 2 3")
Scale = Callable[[np.ndarray], np.ndarray]


def percent(value: float) -> str:
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%"


def figure(panel: Panel) -> str:
    """The panel with its title."""
    return (
        f"<figure><figcaption><b>{html.escape(panel.title)}</b><span>{html.escape(panel.subtitle)}</span></figcaption>"
        f"{plot(panel)}</figure>\n"
    )


def plot(panel: Panel) -> str:
    """The panel alone."""
    low, high = panel.range()

    def across(steps: np.ndarray) -> np.ndarray:
        return steps / panel.last_step

    def down(values: np.ndarray) -> np.ndarray:
        return (high - values) / (high - low)

    rows = "".join(_row(panel.show(tick), (high - tick) / (high - low)) for tick in panel.ticks())
    restarts = "".join(
        f'<line class="restart" x1="{percent(step / panel.last_step)}" x2="{percent(step / panel.last_step)}" '
        f'y2="100%"><title>resumed at step {step:,.0f}</title></line>'
        for step in panel.restarts
    )
    curves = "".join(_curve(series, across, down) for series in panel.series if series.look != "marks")
    marks = "".join(_marks(series, across, down) for series in panel.series if series.look == "marks")
    labels = step_labels(panel.last_step, 'y="100%" dy="18"')
    return (
        f'<svg class="plot" role="img" aria-label="{html.escape(panel.title)} over optimizer steps">{rows}{restarts}'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">{curves}</svg>{marks}'
        f"{labels}</svg>"
    )


def step_labels(last: float, place: str) -> str:
    """Numbers of steps along an axis from 0 to `last`."""
    return "".join(
        f'<text x="{percent(tick / last)}" {place} text-anchor="{"end" if tick > 0.95 * last else "middle"}">'
        f"{show_step(tick)}</text>"
        for tick in step_ticks(last)
    )


def _row(text: str, y: float) -> str:
    return (
        f'<line class="grid" x2="100%" y1="{percent(y)}" y2="{percent(y)}"/>'
        f'<text x="-8" y="{percent(y)}" dy="4" text-anchor="end">{html.escape(text)}</text>'
    )


def _path(across: np.ndarray, down: np.ndarray) -> str:
    return "L".join(f"{x:.0f} {y:.1f}" for x, y in zip(SIDE * across, SIDE * down, strict=True))


def _curve(series: Series, across: Scale, down: Scale) -> str:
    path = "M" + _path(across(series.steps), down(series.values))
    if series.low is not None:
        back = slice(None, None, -1)
        path += "L" + _path(across(series.steps[back]), down(series.low[back])) + "Z"
        return f'<path class="{series.look}" style="fill:{series.colour}" d="{path}"/>'
    path += "h0" if len(series.steps) == 1 else ""  # a dot
    dash = DASHES[series.dash % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash and series.look == "line" else ""
    return f'<path class="{series.look}" stroke="{series.colour}"{dashes} d="{path}"/>'


def _marks(series: Series, across: Scale, down: Scale) -> str:
    return "".join(
        f'<circle r="3.2" cx="{percent(x)}" cy="{percent(y)}" stroke="{series.colour}">'
        f"<title>step {step:,.0f}: {value:.4g}</title></circle>"
        for x, y, step, value in zip(
            across(series.steps), down(series.values), series.steps, series.values, strict=True
        )
    )
