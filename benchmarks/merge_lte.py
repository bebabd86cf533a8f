"""`lte-scale train`, command line and all, that reads the counters at two of its steps.

torchrun ... benchmarks/merge_lte.py FIRST LAST train CONFIG [key=value ...]
"""

from __future__ import annotations

import sys
from typing import Any

from figures import tell
from merge_marks import Marks

from lte_scale import launch
from lte_scale.cli import main
from lte_scale.trainer import Trainer

FIRST, LAST = map(int, sys.argv[1:3])


class MarkedTrainer(Trainer):
    """The trainer, which looks at the counters when a step is over, its merge included."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.marks = Marks(FIRST, LAST, self.topology.ranks_per_node)
        self.merged_seconds = 0.0

    def stepped(self) -> None:
        super().stepped()
        self.marks.passed(self.state.step)
        if self.state.step == FIRST:
            self.merged_seconds = self.state.merge_seconds  # the counter that metrics.jsonl has
        if self.state.step == LAST:
            tell({**self.marks.figures(), "merge_seconds": self.state.merge_seconds - self.merged_seconds})


if __name__ == "__main__":
    vars(launch)["Trainer"] = MarkedTrainer
    sys.exit(main(sys.argv[3:]))
