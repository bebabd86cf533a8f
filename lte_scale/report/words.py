"""Figures in words: counts, shares, bytes, times."""

from __future__ import annotations

import math
import re


def count(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def portion(value: float) -> str:
    return f"{100 * value:.1f} %"


def _prefixed(value: float) -> tuple[float, str]:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return value, unit


def size(value: float) -> str:
    """Bytes with a decimal prefix and three digits."""
    value, unit = _prefixed(value)
    digits = 0 if unit == "B" and value == int(value) else max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:,.{digits}f} {unit}"


def round_size(value: float) -> str:
    """Bytes of a round number, as at an axis."""
    value, unit = _prefixed(value)
    return f"{value:,g} {unit}"


def clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """A part of a step: three digits in ms, or in s."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1000 * seconds, "ms")
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def times(factor: float) -> str:
    """A factor with as many digits as matter."""
    return f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}"


def unbroken(text: str) -> str:
    """A text whose figures are not parted from their units at the end of a line."""
    return re.sub(r"(?<=\d) (?=%|(?:m?s|[kMGT]?B)\b)", "\u00a0", text)


def several(number: float, one: str, more: str = "") -> str:
    """`1 restart`, `2 restarts`."""
    return f"{count(number)} {one if number == 1 else more or one + 's'}"


def ratio(part: float, whole: float) -> float:
    """NaN where there is nothing to be a part of."""
    return part / whole if whole else math.nan
