"""Traces of a few steps by torch.profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lte_scale.collectives import Collectives
from lte_scale.log import log
from lte_scale.schedules import parse_range


class Profiler:
    """Traces `steps` (as `100..110`, both included; empty is none) into `run_dir/profile/rank<N>.json.gz`."""

    def __init__(self, steps: str, run_dir: Path, collectives: Collectives) -> None:
        self.steps = parse_range(steps)
        self.rank = collectives.topology.rank
        self.path = run_dir / "profile" / f"rank{self.rank}.json.gz"
        self._running: profile | None = None

    def stepped(self, step: int) -> None:
        """After every step, and before the first one with the number of the one before."""
        if self._running is not None:
            self._running.step()
        if self._running is None and step + 1 in self.steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each rank says four lines
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=activities)
            self._running.start()
        elif self._running is not None and step + 1 not in self.steps:
            self.close()

    def close(self) -> None:
        """Write what has been traced."""
        if self._running is None:
            return
        self._running.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            log.warning("the trace of rank %d could not be written to %s: %s", self.rank, self.path, error)
        else:
            log.info("traced steps %d to %d: %s", self.steps[0], self.steps[-1], self.path.parent)
        self._running = None
