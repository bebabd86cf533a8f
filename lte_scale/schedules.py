"""Pure functions of the step: learning rate, cadence, durations."""

from __future__ import annotations

import math
import re
from typing import Literal


def parse_duration(text: str) -> tuple[float, Literal["steps", "epochs"]]:
    """`"500"` is 500 steps, `"2ep"` or `"0.5ep"` are epochs.

    Raises:
        ValueError: if `text` is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ep)?\s*", text)
    if match is None or (match[2] is None and "." in match[1]):
        raise ValueError(f"{text!r} is no duration: write steps as `500` or epochs as `2ep`")
    return float(match[1]), "epochs" if match[2] else "steps"


def to_steps(text: str, steps_per_epoch: float) -> int:
    """A duration in optimizer steps, rounded up; zero stays zero."""
    value, unit = parse_duration(text)
    return math.ceil(value * steps_per_epoch - 1e-9) if unit == "epochs" else int(value)


def lr_at(step: int, *, name: str, peak: float, total: int, warmup: int, decay: int, final_ratio: float) -> float:
    """Learning rate of optimizer step `step` (1 ... total): linear warm-up, then `cosine`, `wsd` or `constant`."""
    if warmup and step <= warmup:
        return peak * step / warmup
    final = peak * final_ratio
    if name == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if name == "wsd" and decay and step > total - decay:
        return peak + (final - peak) * (step - (total - decay)) / decay
    return peak


def rewarmed(step: int, *, window: int, share: float) -> float:
    """Factor of the rate of step `step` (1 ...): after the first window it comes back in each one's `share`."""
    since, length = (step - 1) % window + 1, math.ceil(share * window)
    return min(1.0, since / length) if length and step > window else 1.0


def due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something with period `every` is due after `step`; always after the step `last`; never if 0."""
    return step == last or (every > 0 and step % every == 0)


def passed(step: int, every: int, previous: int) -> bool:
    """Whether a multiple of `every` lies in (previous, step]: for what waits for a merge to be possible."""
    return every > 0 and step // every > previous // every


def parse_range(text: str) -> range:
    """Steps `100..110` (both included); empty text is none.

    Raises:
        ValueError: if the text is no such range.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{text[:40]!r} is no range of steps; write it as `100..110`")
    return range(int(found[1]), int(found[2]) + 1)
