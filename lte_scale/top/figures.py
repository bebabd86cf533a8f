"""Figures as words."""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(count: float | None) -> str:
    """Bytes with a unit."""
    if count is None or not math.isfinite(count):
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """As 12 s, 4:05 (minutes), 3:04:05 (hours) or 2 d 03:04 (days)."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{whole // 86400} d {whole // 3600 % 24:02}:{whole // 60 % 60:02}"


def age(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:,.1f}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def natural(text: str) -> tuple[int, str]:
    """To sort by: `2` before `10`."""
    return len(text), text
