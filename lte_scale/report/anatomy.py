"""Where the time of a step goes: over all of a run, and over its steps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lte_scale.report.curves import MEMORY, Panel, Series, panels
from lte_scale.report.runs import Run
from lte_scale.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from lte_scale.report.svg import figure
from lte_scale.report.tables import Row, bar, section, table
from lte_scale.report.words import clock, duration, portion, unbroken

# Phases of a step by their names in the records: words and colour, in the order in which they are drawn.
PHASES = {
    "forward": ("forward pass", BLUE),
    "backward": ("backward pass", SKY),
    "data_wait": ("waiting for data", ORANGE),
    "collectives": ("averaging gradients inside heads", PURPLE),
    "optimizer": ("the optimizer", GREEN),
    "merge": ("merging heads", VERMILION),
    "evaluate": ("evaluation", YELLOW),
    "checkpoint": ("checkpoints", GREY),
    "record": ("writing metrics", "#555c66"),
}
STRETCHES = 80


def increases(counter: np.ndarray) -> np.ndarray:
    """What a counter grew by, record by record; one that fell has begun anew at zero."""
    known = np.flatnonzero(np.isfinite(counter))
    grown = np.zeros(len(counter))
    differences = np.diff(counter[known], prepend=0.0)
    grown[known] = np.where(differences < 0, counter[known], differences)
    return grown


def phases(run: Run) -> dict[str, float]:
    """Seconds per step of every phase, over the whole run, in the order of `PHASES`."""
    totals = {name: float(increases(column).sum()) / max(run.step, 1) for name, column in _ordered(run).items()}
    return {name: seconds for name, seconds in totals.items() if seconds > 0}


def _ordered(run: Run) -> Mapping[str, np.ndarray]:
    found = run.parts("phase_seconds")
    return {name: found[name] for name in [*PHASES, *sorted(set(found) - set(PHASES))] if name in found}


def _words(phase: str) -> str:
    return PHASES[phase][0] if phase in PHASES else phase.replace("_", " ")


def _colour(phase: str) -> str:
    return PHASES[phase][1] if phase in PHASES else GREY


def largest_part(run: Run) -> str:
    """The sentence on what takes most besides computing; empty where the records do not tell."""
    parts = phases(run)
    others = {name: seconds for name, seconds in parts.items() if name not in ("forward", "backward")}
    if not others:
        return ""
    name, whole = max(others, key=lambda each: others[each]), sum(parts.values())
    spent = f"{duration(others[name])} of {duration(whole)} per step ({portion(others[name] / whole)})"
    return (
        f"Besides forward and backward passes, most time went to {_words(name)}: {spent}, {_total(run, name)} in all."
    )


def _total(run: Run, phase: str) -> str:
    return clock(float(increases(run.column(f"phase_seconds.{phase}")).sum()))


def anatomy(runs: Sequence[Run]) -> str:
    """The section on the time of a step; empty where no record has phases."""
    known = [run for run in runs if phases(run)]
    if not known:
        return ""
    longest = max(sum(phases(run).values()) for run in known)
    bars = ""
    for run in known:
        parts = phases(run)
        whole = sum(parts.values())
        spans = "".join(
            f'<span style="width:{100 * seconds / longest:.2f}%;background:{_colour(name)}" '
            f'title="{html.escape(_words(name))}: {duration(seconds)}"></span>'
            for name, seconds in parts.items()
        )
        note = f"<b>{duration(whole)}</b> per step. {html.escape(unbroken(largest_part(run)))}"
        bars += bar(run.label, f'<span class="track">{spans}</span>', note)
    names = dict.fromkeys(name for run in known for name in phases(run))
    rows = [
        Row(f'<i class="box" style="background:{_colour(name)}"></i>{html.escape(_words(name))}', partial(_cell, name))
        for name in names
    ]
    over_steps = "".join(figure(panel) for panel in [*_areas(runs), *panels([MEMORY], runs)])
    return (
        f'<div class="bars">{bars}</div>{table(known, section("", rows, known))}'
        f'<div class="panels after">{over_steps}</div>'
    )


def _cell(phase: str, run: Run) -> str | None:
    parts = phases(run)
    return f"{duration(parts[phase])} · {portion(parts[phase] / sum(parts.values()))}" if phase in parts else None


def _areas(runs: Sequence[Run]) -> list[Panel]:
    """The phases of a single run, over its steps, on top of one another."""
    run = runs[0]
    if len(runs) > 1 or len(run.steps) < 3:
        return []
    edges = np.linspace(0, run.step, min(STRETCHES, len(run.steps)) + 1)
    low = np.zeros(2 * (len(edges) - 1))
    drawn = []
    for name, column in _ordered(run).items():
        grown = np.interp(edges, [0, *run.steps], [0, *np.cumsum(increases(column))])
        high = low + np.repeat(1000 * np.diff(grown) / np.diff(edges), 2)
        drawn.append(Series(np.repeat(edges, 2)[1:-1], high, "area", low, _colour(name)))
        low = high
    subtitle = "phases on top of one another, in the colours of the table"
    return [Panel("Time per step, ms", subtitle, drawn, float(run.step), lambda ms: f"{ms:,g}", zero=True)]
