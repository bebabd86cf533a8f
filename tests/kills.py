"""kill -9 of parts of an emulated run at random moments, and the same command again until the run has ended."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
KINDS = ("rank", "agent", "launcher", "all")
KILLS, SEED = int(os.environ.get("KILLS", "3")), int(os.environ.get("SEED", "0"))
"""How many kills a test makes, and what chooses them."""
_END_SECONDS = 60.0


def emulated(launcher: int) -> dict[int, list[bytes]]:
    """The environment of every process of an emulation but its launcher, by process id."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = environ.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if any(entry.startswith(f"LTE_EMULATION={launcher}-".encode()) for entry in entries):
            found[int(environ.parent.name)] = entries
    return found


@dataclass
class Kills:
    """Runs `words` on emulated nodes and kills parts of it.

    Attributes:
        what: a rank, an agent with its node, the launcher, or all at once, in the order killed.
        recovery_seconds: from every kill to the first step that was not there before.
        left: how often processes of the run outlived its launcher by a minute.
    """

    words: list[str]
    run_dir: Path
    nodes: int
    ranks_per_node: int
    random: random.Random
    what: list[str] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    left: int = 0

    def run(self, kills: int, *, within_seconds: float) -> str:
        """Start until the run ends by itself, killing the first `kills` starts. Returns the last start's output.

        Args:
            within_seconds: a kill comes at most so long after the first new step; one in four comes before it.
        """
        killed_at: float | None = None
        for number in range(kills + 50):
            job = self.start()
            kind = self.random.choice(KINDS) if number < kills else ""
            early, delay = self.random.random() < 0.25, self.random.uniform(0, within_seconds)
            if kind and early:
                self._sleep(job, 3 * delay)  # while it imports, rendezvous, loads
            else:
                self._wait_for_a_step(job)
                if killed_at is not None and job.poll() is None:
                    self.recovery_seconds.append(time.monotonic() - killed_at)
                    killed_at = None
                self._sleep(job, delay)
            if kind and job.poll() is None:
                killed_at = time.monotonic()
                self.kill(job, kind)
                self.what.append(kind)
            output, _ = job.communicate(timeout=300)
            self._see_all_gone(job)
            if job.returncode == 0:
                return output
            assert kind, f"a run that nobody killed ended with {job.returncode}:\n{output[-3000:]}"
        raise AssertionError("the run does not come to its end")

    def start(self) -> subprocess.Popen[str]:
        place = ["--nodes", str(self.nodes), "--ranks-per-node", str(self.ranks_per_node), "--"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launchers" / "emulate.py"), *place, *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, job: subprocess.Popen[str], kind: str) -> None:
        ranks, agents = self._processes(job)
        chosen = {
            "rank": [self.random.choice(ranks)] if ranks else [],
            "agent": [self.random.choice(agents)] if agents else [],
            "launcher": [job.pid],
            "all": [job.pid, *agents, *ranks],
        }[kind]
        for pid in chosen or [job.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _processes(self, job: subprocess.Popen[str]) -> tuple[list[int], list[int]]:
        """Ranks (and what they have forked), and the other processes of the emulation but its launcher."""
        ranks: list[int] = []
        agents: list[int] = []
        for pid, entries in emulated(job.pid).items():
            is_rank = any(entry.startswith(b"RANK=") for entry in entries)
            (ranks if is_rank else agents).append(pid)
        return ranks, agents

    def _see_all_gone(self, job: subprocess.Popen[str]) -> None:
        until = time.monotonic() + _END_SECONDS
        while any(left := self._processes(job)) and time.monotonic() < until:
            time.sleep(0.05)
        self.left += bool(any(left))
        for pid in [*left[0], *left[1]]:
            os.kill(pid, signal.SIGKILL)

    def _wait_for_a_step(self, job: subprocess.Popen[str]) -> None:
        metrics, began = self.run_dir / "metrics.jsonl", time.time()
        while job.poll() is None and not (metrics.exists() and metrics.stat().st_mtime > began):
            time.sleep(0.02)

    def _sleep(self, job: subprocess.Popen[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while job.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
