"""What a run sent and how long it took between two of its steps: the kernel's counters and the clock, read in the run.

Reading between two steps, not at the end of a run, leaves out all that a start costs: rendezvous, connections, the
first exchange of weights, compilation, checkpoints. The difference of two runs of different lengths would too, at
the price of a second run and of its noise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


class Marks:
    """Stands after steps `first` and `last` of a run. Collective to make and to pass.

    Args:
        ranks_per_node: ranks are numbered node by node; those of a node share a counter.
    """

    def __init__(self, first: int, last: int, ranks_per_node: int) -> None:
        self.first, self.last, self.ranks_per_node = first, last, ranks_per_node
        # A group of its own: exchanges of the run that are on their way must not meet with these.
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self.read: dict[int, tuple[float, list[int]]] = {}

    def passed(self, step: int) -> None:
        """Called by every rank after every step."""
        if step not in (self.first, self.last):
            return
        # When all are here, what was sent in the steps before has been received, so it has passed the counters.
        dist.barrier(self.group)
        now = time.perf_counter()
        own = torch.tensor([int(COUNTER.read_text())])
        counters = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(counters, own, group=self.group)
        self.read[step] = now, [int(counter) for counter in counters[:: self.ranks_per_node]]

    def figures(self) -> dict[str, Any]:
        """`steps`, `seconds`, and `bytes_by_node` that each node sent, between the marks."""
        (began, before), (ended, after) = self.read[self.first], self.read[self.last]
        sent = [late - early for early, late in zip(before, after, strict=True)]
        return {"steps": self.last - self.first, "seconds": ended - began, "bytes_by_node": sent}
