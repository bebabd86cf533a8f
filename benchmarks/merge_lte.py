"""`lte-scale train`, command line and all, that reads the counters at two of its steps.

torchrun ... benchmarks/merge_lte.py FIRST LAST train CONFIG [key=value ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from figures import tell
from merge_marks import Marks

from lte_scale import launch
from lte_scale.cli import main
from lte_scale.collectives import Group
from lte_scale.trainer import Trainer

FIRST, LAST = map(int, sys.argv[1:3])


class MarkedTrainer(Trainer):
    """The trainer, which looks at the counters when a step is over, its merge included."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.marks = Marks(FIRST, LAST, self.topology.ranks_per_node)
        self.waited = 0.0
        self.before = (0.0, 0.0)
        # From here on: the exchanges beside training have collectives of their own, made before.
        self.call, vars(self.collectives)["call"] = self.collectives.call, self.timed_call

    @contextmanager
    def timed_call(self, group: Group, purpose: str, sent: int) -> Iterator[None]:
        """What training waits for in merges: the time in their collectives between nodes, arithmetic left out."""
        began = time.perf_counter()
        with self.call(group, purpose, sent):
            yield
        if group.scope == "inter_node" and purpose.startswith("merge"):
            self.waited += time.perf_counter() - began

    def stepped(self) -> None:
        super().stepped()
        self.marks.passed(self.state.step)
        spent = (self.state.merge_seconds, self.waited)  # the former is the counter that metrics.jsonl has
        if self.state.step == FIRST:
            self.before = spent
        if self.state.step == LAST:
            merge, wait = (late - early for early, late in zip(self.before, spent, strict=True))
            tell({**self.marks.figures(), "merge_seconds": merge, "wait_seconds": wait})


if __name__ == "__main__":
    vars(launch)["Trainer"] = MarkedTrainer
    sys.exit(main(sys.argv[3:]))
