"""The events of a run, from its events.log: one line each, `ISO-time rank N level message`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

_LINE = re.compile(r"(\S+) rank (\d+) (\w+) (.*)")
# What an event is about, by its message; the first that matches. Errors are errors whatever they are about.
_KINDS = {
    "start": re.compile(r".* on \d+ nodes x \d+ ranks "),
    "restart": re.compile(r"resumed from .* at step (?P<step>\d+) of (?P<planned>\d+)"),
    "stop": re.compile(r"(?:stop requested: all ranks end|stopped) after step (?P<step>\d+)"),
    "checkpoint": re.compile(r"saved checkpoint step_(?P<step>\d+)"),
    "skipped": re.compile(r"step (?P<step>\d+): head \d+ (?:skipped|withdrawn)"),
    "stalled": re.compile(r"(?:hang: )?no progress for [\d.]+ s after step (?P<step>\d+)"),
    "data": re.compile(r"skipped damaged |evaluation: left out damaged |.* is damaged after \d+ samples"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """An event. `kind` is one of `_KINDS`, error, warning or note; `step` and `planned` are what its message names."""

    time: datetime
    rank: int
    level: str
    message: str
    kind: str
    step: int | None = None
    planned: int | None = None


@dataclass(frozen=True, slots=True)
class Repeated:
    """Events in a row that say the same but for their numbers."""

    first: Event
    ranks: frozenset[int]
    number: int


def read_events(path: Path) -> list[Event]:
    """All events of all parts of a run, in their order; none of a file that is missing. Damaged lines are left out."""
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except OSError:
        return []
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: str) -> Event | None:
    match = _LINE.fullmatch(line.rstrip("\r"))
    if match is None:
        return None
    try:
        time = datetime.fromisoformat(match[1])
        time = time if time.tzinfo else time.astimezone()
    except (ValueError, OverflowError):
        return None
    message = "".join(letter if letter.isprintable() else "�" for letter in match[4])
    kind_of_level = {"warning": "warning", "error": "error", "critical": "error"}.get(match[3], "note")
    event = Event(time, int(match[2]), match[3], message, kind_of_level)
    for kind, pattern in _KINDS.items():
        if (found := pattern.match(message)) is not None:
            named = found.groupdict()
            step, planned = (int(named[name]) if name in named else None for name in ("step", "planned"))
            return replace(event, kind="error" if kind_of_level == "error" else kind, step=step, planned=planned)
    return event


def place(events: Sequence[Event], times: np.ndarray, steps: np.ndarray) -> list[tuple[float, Event]]:
    """Events with the steps they happened at: named in the message, or by the times of the records around them.

    Those are left out for which neither tells.
    """
    known = np.flatnonzero(np.isfinite(times) & np.isfinite(steps))
    known = known[np.argsort(times[known], kind="stable")]
    if not len(known):
        return [(float(event.step), event) for event in events if event.step is not None]
    # Before the first record lies the start, at a time that no record tells.
    moments = np.array([event.time.timestamp() for event in events])
    between = np.interp(moments, times[known], steps[known], left=0.0)
    return [
        (float(step) if event.step is None else float(event.step), event)
        for step, event in zip(between, events, strict=True)
    ]


def repeated(events: Sequence[Event]) -> Iterator[Repeated]:
    """Events in a row that say the same but for their numbers, as one; damaged data whatever its names."""
    group: list[Event] = []
    for event in events:
        if group and _same(event) != _same(group[0]):
            yield Repeated(group[0], frozenset(each.rank for each in group), len(group))
            group = []
        group.append(event)
    if group:
        yield Repeated(group[0], frozenset(each.rank for each in group), len(group))


def _same(event: Event) -> tuple[str, str]:
    return event.kind, "" if event.kind == "data" else re.sub(r"\d+(\.\d+)?", "#", event.message)
