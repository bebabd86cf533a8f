"""How fast the ranks of a group exchange messages, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lte_scale.collectives import Collectives, Group, all_gather_bytes, all_gather_single, all_reduce_bytes

_FIRST_BYTES = 256 << 10
_GROWTH = 4
_MEASURED_SECONDS = 2.0
_REPETITIONS = 20


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Measures as all ranks of `collectives` at once, on `device`.

    Attributes:
        message_bytes: of the largest message, where links are fast.
        gather: by all-gathers, as heads merge, of so much from each rank; else by all-reduces.
    """

    collectives: Collectives
    device: torch.device
    message_bytes: int
    gather: bool = False

    def of(self, group: Group) -> float:
        """Bytes per second that this rank sends while all groups exchange, each its own message. Collective.

        Raises whatever torch.distributed does when a rank is gone.
        """
        if group.size == 1:
            return 0.0
        message_bytes = min(_FIRST_BYTES, self.message_bytes)
        seconds = self._timed(group, message_bytes, 1)
        while message_bytes < self.message_bytes and seconds * _GROWTH < _MEASURED_SECONDS / 4:
            message_bytes = min(_GROWTH * message_bytes, self.message_bytes)
            seconds = self._timed(group, message_bytes, 1)
        seconds = self._timed(group, message_bytes, 1)  # the one before was also the first of its size
        repetitions = max(1, min(_REPETITIONS, int(_MEASURED_SECONDS / seconds)))
        sent = all_gather_bytes if self.gather else all_reduce_bytes
        return sent(group.size, message_bytes) / self._timed(group, message_bytes, repetitions)

    def _timed(self, group: Group, message_bytes: int, repetitions: int) -> float:
        """Seconds per exchange, of the slowest rank of all: ranks must agree how to go on."""
        message = torch.zeros(message_bytes // 4, device=self.device)
        gathered = message.new_empty(group.size * message.numel() if self.gather else 0)
        slowest(0.0, self.collectives, self.device)
        work: Any = None
        began = time.perf_counter()
        for _ in range(repetitions):
            if self.gather:
                work = all_gather_single(gathered, message, group=group.process_group, async_op=True)
            else:
                work = dist.all_reduce(message, group=group.process_group, async_op=True)
            if self.device.type == "cpu":
                work.wait()
        if self.device.type == "cuda":
            work.wait()
            torch.cuda.synchronize()
        return slowest((time.perf_counter() - began) / repetitions, self.collectives, self.device)


def slowest(seconds: float, collectives: Collectives, device: torch.device) -> float:
    """The longest time of all ranks. Collective."""
    value = torch.tensor([seconds], device=device, dtype=torch.float64)
    return float(collectives.all_reduce(value, collectives.world, "control", maximum=True).item())
