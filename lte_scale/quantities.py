"""Bytes, times, rates and ratios as people read them, to three digits or so; `-` for what is not known."""

from __future__ import annotations


def size(count: float, unit: str = "B") -> str:
    """A count with a decimal prefix: 1,234,567 bytes are `1.23 MB`."""
    if count < 999.5:
        return f"{count:.0f} {unit}"
    for prefix in "kMG":
        count /= 1000
        if count < 999.5:
            return f"{count:.2f} {prefix}{unit}"
    return f"{count / 1000:.2f} T{unit}"


def seconds(value: float | None) -> str:
    """A time in s, below one in ms."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"


def rate(gbit: float | None) -> str:
    """A rate in Gbit/s."""
    return "-" if gbit is None else f"{gbit:.3g} Gbit/s"


def share(value: float | None) -> str:
    """A ratio in percent, from one on as a multiple: 0.123 is `12.3%`, 12.3 is `12.3 x`."""
    if value is None:
        return "-"
    return f"{value:.1%}" if value < 1 else f"{value:.3g} x"
