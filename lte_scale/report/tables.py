"""Tables of the page, a line per figure and a column per run, and bars."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lte_scale.report.curves import palette
from lte_scale.report.runs import Run

NONE = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of every run. `best` (max or min) picks the value that is shown in bold. `label` is HTML."""

    label: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str] = str
    best: Callable[[list[float]], float] | None = None


def table(runs: Sequence[Run], body: str) -> str:
    """In a box of its own, which scrolls where the screen is narrow."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in names(runs))
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if len(runs) > 1 else ""
    return f'<div class="wide" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def section(name: str, rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """Rows below a title, without those for which no run has a value; empty if none has."""
    body = ""
    for row in rows:
        cells = _cells(row, [row.value(run) for run in runs])
        if set(cells) != {NONE}:
            body += line(row.label, cells)
    title = f'<tr class="section"><th colspan="{len(runs) + 1}" scope="rowgroup">{html.escape(name)}</th></tr>'
    return title + body if body and name else body


def line(label: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def names(runs: Sequence[Run]) -> list[str]:
    """The label of every run after the colour of its curves."""
    dashes = ("solid", "dashed", "dotted", "double")
    return [
        f'<i style="border-color:{colour};border-top-style:{dashes[dash % len(dashes)]}"></i>{html.escape(run.label)}'
        for run, colour, dash in palette(runs)
    ]


def _cells(row: Row, values: Sequence[Any]) -> list[str]:
    """The best in bold where runs differ."""
    missing = [value is None or (isinstance(value, float) and not math.isfinite(value)) for value in values]
    known = [value for value, gone in zip(values, missing, strict=True) if not gone]
    texts = [NONE if gone else html.escape(row.show(value)) for value, gone in zip(values, missing, strict=True)]
    if row.best is None or len(set(known)) < 2:
        return texts
    best = row.best(known)
    return [f"<strong>{t}</strong>" if value == best else t for t, value in zip(texts, values, strict=True)]


def bar(label: str, track: str, note: str) -> str:
    """A bar between its name and, below it, what it says (HTML)."""
    return f'<div class="bar"><span>{html.escape(label)}</span>{track}<p>{note}</p></div>'
