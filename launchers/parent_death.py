"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process get a signal when its parent ends; for `preexec_fn` too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
