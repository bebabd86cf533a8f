"""What happened in a run: a strip of events over its steps, and their list."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from lte_scale.cadence import Cadence
from lte_scale.report.events import Event, Repeated, place, repeated
from lte_scale.report.runs import Run
from lte_scale.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from lte_scale.report.svg import percent, step_labels
from lte_scale.report.words import count, several

# Kinds of events that have a lane, in this order: name and colour.
LANES = {
    "checkpoint": ("Checkpoints", GREEN),
    "restart": ("Restarts", PURPLE),
    "stop": ("Stops", SKY),
    "skipped": ("Skipped steps", ORANGE),
    "data": ("Damaged data", ORANGE),
    "stalled": ("No progress", PURPLE),
    "warning": ("Warnings", VERMILION),
    "error": ("Errors", VERMILION),
}
MOST_DOTS = 200
MOST_MERGES = 60
MOST_LISTED = 300
OPEN_LISTED = 12


def timelines(runs: Sequence[Run]) -> str:
    """The strip and the list of every run."""
    shown = ""
    for run in runs:
        name = f"<h3>{html.escape(run.label)}</h3>" if len(runs) > 1 else ""
        shown += name + _strip(run) + _list(list(repeated(run.events)), most=OPEN_LISTED if len(runs) == 1 else 0)
    return shown


def cadence(run: Run) -> Cadence | None:
    """When the run merges, by its configuration; None where that does not tell."""
    every, local, region, growth = (
        run.config.get(f"merge.{key}") for key in ("every", "local_every", "region_every", "growth")
    )
    if not isinstance(every, int) or every < 1:
        return None
    region = region if isinstance(region, int) and 0 < region < every else 0
    inside = local if isinstance(local, int) and 0 < local < every else region or every
    growth = growth if isinstance(growth, float) and 0.01 <= growth <= 1 else 0.0
    return Cadence(every, inside, growth=growth, region_every=region)


def _strip(run: Run) -> str:
    last = max(run.step, 1)
    lanes = _evaluations(run, last) + _merges(run, last)
    placed = place(run.events, run.column("time"), run.steps)
    for kind, (name, colour) in LANES.items():
        found = [(step, event) for step, event in placed if event.kind == kind]
        if kind == "stop":  # asked for, and then done: one stop
            found = [each for each in found if not each[1].message.startswith("stopped")] or found
        if found:
            lanes += _lane(f"{name} <b>{count(len(found))}</b>", _dots(found, last, colour))
    axis = '<svg class="axis">' + step_labels(last, 'y="16"') + "</svg>"
    return f'<div class="lanes">{lanes}{_lane("Step", axis)}</div>' if lanes else ""


def _lane(name: str, content: str) -> str:
    return f'<div class="lane"><span>{name}</span>{content}</div>'


def _dots(placed: Sequence[tuple[float, Event]], last: float, colour: str) -> str:
    """A dot per event; events too close to be told apart share one."""
    at: dict[float, list[Event]] = {}
    for step, event in placed:
        at.setdefault(round(min(step / last, 1.0) * 400) / 400, []).append(event)
    dots = ""
    for x, events in at.items():
        more = f" (and {several(len(events) - 1, 'more', 'more')})" if len(events) > 1 else ""
        title = f"{events[0].time:%Y-%m-%d %H:%M:%S} {events[0].message[:200]}{more}"
        dots += _dot(x, colour, title)
    return f'<svg class="strip">{dots}</svg>'


def _dot(x: float, colour: str, title: str) -> str:
    return f'<circle cx="{percent(x)}" cy="50%" r="4.5" fill="{colour}"><title>{html.escape(title)}</title></circle>'


def _evaluations(run: Run, last: float) -> str:
    top1, loss = run.column("eval_top1"), run.column("eval_loss")
    marks = ""
    found = np.flatnonzero(np.isfinite(top1) | np.isfinite(loss))
    for i in found[:: max(1, len(found) // MOST_DOTS)]:
        figures = [f"top-1 {100 * top1[i]:.2f} %"] if math.isfinite(top1[i]) else []
        figures += [f"loss {loss[i]:.4g}"] if math.isfinite(loss[i]) else []
        title = f"step {run.steps[i]:,.0f}: {', '.join(figures)}"
        marks += _dot(run.steps[i] / last, BLUE, title)
    name = f"Evaluations <b>{count(len(found))}</b>"
    return _lane(name, f'<svg class="strip">{marks}</svg>') if len(found) else ""


def _merges(run: Run, last: int) -> str:
    found = cadence(run)
    if found is None:
        return ""
    between = [step for step in range(1, last + 1) if found.departs(step) == 0]
    ticks = ""
    ran = range(1, last + 1)
    for steps, height in ((filter(found.is_local, ran), 4), (filter(found.is_regional, ran), 6), (between, 9)):
        placed = list(steps)
        for step in placed if len(placed) <= MOST_MERGES else ():
            ends = f'x1="{percent(step / last)}" x2="{percent(step / last)}" y1="{13 - height}" y2="{13 + height}"'
            ticks += f'<line {ends} stroke="{GREY}" opacity="0.7"/>'
    inside = f", inside the node every {found.local_every:,}" if found.two_level else ""
    inside += f", inside the region every {found.region_every:,}" if found.region_every else ""
    grown = f" from step {found.grown:,} on" if found.growth else ""
    words = f'<span class="note">every {found.every:,} steps{inside}{grown}</span>'
    return _lane(f"Merges <b>{count(len(between))}</b>", f'<svg class="strip">{ticks}</svg>' if ticks else words)


def _list(groups: Sequence[Repeated], most: int) -> str:
    """Behind a line to open it if longer than `most`."""
    if not groups:
        return '<p class="note">events.log holds no events.</p>'
    items = "".join(_item(group) for group in groups[:MOST_LISTED])
    if len(groups) > MOST_LISTED:
        items += f"<li>and {count(len(groups) - MOST_LISTED)} more in events.log</li>"
    listed = f'<ol class="events">{items}</ol>'
    if len(groups) <= most:
        return listed
    total = sum(group.number for group in groups)
    return f"<details><summary>All {several(total, 'event')}</summary>{listed}</details>"


def _item(group: Repeated) -> str:
    first = group.first
    repeats = f"<b>{count(group.number)} times, first:</b> " if group.number > 1 else ""
    ranks = ", ".join(map(str, sorted(group.ranks)[:8])) + (", …" if len(group.ranks) > 8 else "")
    on = f" <em>rank{'s' if len(group.ranks) > 1 else ''} {ranks}</em>" if group.ranks != {0} else ""
    return (
        f"<li><time>{first.time:%Y-%m-%d %H:%M:%S}</time><em>{html.escape(first.kind)}</em>"
        f"<span>{repeats}{html.escape(first.message)}{on}</span></li>"
    )
