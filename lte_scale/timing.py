"""Time by name on the device's own clock: a CPU's wall time, or events in the stream of an accelerator."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

_KEPT = 65_536
"""Parts kept for `drain`; older ones are dropped where nobody calls it."""

K = TypeVar("K", bound=Hashable)


class Stopwatch(Generic[K]):
    """Times parts of a program; an inner part's time is not the outer one's, so that parts add up to the whole.

    On CUDA a part is marked by two events in the current stream and read by `drain` alone: timing never makes the host
    wait, and what a part costs is what the device spends on it, not the time to queue it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[K] = []
        self._since: Any = None
        self._marks: deque[tuple[int, K, Any, Any]] = deque(maxlen=_KEPT)
        self._lap = 0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: K) -> Iterator[None]:
        now = self._now()
        if self._open:
            self._marks.append((self._lap, self._open[-1], self._since, now))
        self._open.append(name)
        self._since = now
        try:
            yield
        finally:
            now = self._now()
            self._marks.append((self._lap, name, self._since, now))
            self._open.pop()
            self._since = now

    def lap(self) -> None:
        """Begin another step."""
        self._lap += 1

    def drain(self) -> list[tuple[int, K, float]]:
        """(lap, name, seconds) of all parts since the last call, in order. On CUDA it waits for the last event."""
        marks = list(self._marks)
        self._marks.clear()
        if marks and self._cuda:
            marks[-1][3].synchronize()
        if self._cuda:
            return [(lap, name, start.elapsed_time(stop) / 1000) for lap, name, start, stop in marks]
        return [(lap, name, stop - start) for lap, name, start, stop in marks]
