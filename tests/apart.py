"""Nodes that are jobs of their own on this machine, and their lighthouse; some may be killed, stopped and started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import free_port
from tests.test_train import command, records

_JOIN_MS, _HEARTBEAT_MS = 4000, 4000


@dataclass
class Node:
    """One node's job: `torchrun --standalone` with its ranks.

    Attributes:
        job: its agent, while it has been started.
    """

    number: int
    run_dir: Path
    words: list[str]
    ranks: int
    job: subprocess.Popen[str] | None = None

    def start(self) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.job = subprocess.Popen(
            [*launcher, "-m", "lte_scale", *self.words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=(self.run_dir.parent / f"{self.run_dir.name}.log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def signal(self, number: int) -> None:
        """To all processes of the node, data workers too."""
        assert self.job is not None
        for pid in self._processes():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """kill -9 of the whole node."""
        assert self.job is not None
        self.signal(signal.SIGKILL)
        self.job.wait()

    def _processes(self) -> list[int]:
        """The agent, and all that descend from it: ranks are sessions of their own."""
        assert self.job is not None
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(stat.parent.name))
        found, to_see = [], [self.job.pid]
        while to_see:
            found.append(to_see.pop())
            to_see += children.get(found[-1], [])
        return found

    @property
    def output(self) -> str:
        return (self.run_dir.parent / f"{self.run_dir.name}.log").read_text()

    @property
    def events(self) -> str:
        path = self.run_dir / "events.log"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        """The last step that it has recorded."""
        found = records(self.run_dir)
        return int(found[-1]["step"]) if found else 0

    def wait_for_step(self, step: int, *, seconds: float = 120.0) -> None:
        self.wait_for(lambda: self.step >= step, f"step {step}", seconds)

    def wait_for_words(self, words: str, *, seconds: float = 120.0) -> None:
        self.wait_for(lambda: words in self.events, repr(words), seconds)

    def wait_for(self, there: Callable[[], bool], what: str, seconds: float) -> None:
        assert self.job is not None
        until = time.monotonic() + seconds
        while not there():
            ended = self.job.poll() is not None and not there()
            assert not ended and time.monotonic() < until, f"node {self.number}: no {what}\n{self.output[-4000:]}"
            time.sleep(0.05)

    def finish(self, code: int = 0, *, seconds: float = 240.0) -> str:
        """Its output, once it has ended."""
        assert self.job is not None
        assert self.job.wait(seconds) == code, self.output[-4000:]
        return self.output


@dataclass
class Lighthouse:
    """torchft's, on a port of its own, which it keeps when it is started anew."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        tool = Path(sys.executable).parent / "torchft_lighthouse"
        times = ["--join_timeout_ms", str(_JOIN_MS), "--heartbeat_timeout_ms", str(_HEARTBEAT_MS)]
        self.process = subprocess.Popen(
            [str(tool), "--min_replicas", "1", "--bind", f"[::]:{self.port}", *times],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def nodes_apart(
    data: Path, folder: Path, nodes: int, ranks: int, *words: str
) -> Iterator[tuple[Lighthouse, list[Node]]]:
    """A lighthouse that has started, and nodes that have not; all are gone afterwards."""
    lighthouse = Lighthouse()
    found = []
    for number in range(nodes):
        run_dir = folder / f"node{number}"
        fault_tolerance = (
            f"fault_tolerance={{enabled: true, lighthouse: '{lighthouse.address}', nodes: {nodes}, node: {number}, "
            "timeout_seconds: 10}"
        )
        found.append(Node(number, run_dir, command(data, run_dir, *words, fault_tolerance), ranks))
    lighthouse.start()
    try:
        yield lighthouse, found
    finally:
        for node in found:
            if node.job is not None and node.job.poll() is None:
                node.signal(signal.SIGCONT)
                node.kill()
        lighthouse.kill()
