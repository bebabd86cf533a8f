"""The ranks of this node in the all-reduce, from start to the last one gone, and node 0's view of all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import TracebackType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lte_scale.preflight.compare import Answer, cause
from lte_scale.preflight.place import Place
from lte_scale.preflight.ranks import Task, report_failure
from lte_scale.topology import Topology

_MESSAGE_BYTES = {True: 64 << 20, False: 8 << 20}
"""By whether it is on GPUs."""

_NOTICE_SECONDS = 2.0
"""After the first failure, for what caused it to be noticed too."""


class Ranks:
    """The processes of this node's ranks. A context manager that leaves none running."""

    def __init__(self, place: Place, topology: Topology, *, gpu: bool, seconds: float) -> None:
        self.first = place.node * place.ranks
        # Its own store is nearest to node 0 itself, whatever name others know it by.
        address = "127.0.0.1" if place.node == 0 else place.address
        self.task = Task(topology=topology, address=address, port=place.port, gpu=gpu, seconds=seconds,
                         message_bytes=_MESSAGE_BYTES[gpu], parent=os.getpid())  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: set[int] = set()

    def __enter__(self) -> Ranks:
        try:
            for local in range(self.task.topology.ranks_per_node):
                task = replace(self.task, topology=replace(self.task.topology, rank=self.first + local))
                command = [sys.executable, "-m", "lte_scale.preflight.ranks", task.to_json()]
                # An own session: Ctrl-C is for this process alone, which then ends them.
                self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def report_deaths(self, store: TCPStore) -> None:
        """Tell node 0 of ranks that ended: none ends by itself."""
        for local, process in enumerate(self.processes):
            code = process.poll()
            if code is not None and local not in self.told:
                self.told.add(local)
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                report_failure(store, self.first + local, f"{how} in the all-reduce", died=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def answers_of_all(
    store: TCPStore, ranks: Ranks, world: int, seconds: float
) -> tuple[dict[int, Answer], dict[int, str]]:
    """The answers of all ranks of all nodes as they come in, and the reason by rank where they failed. For node 0."""
    began, noticed = time.monotonic(), 0.0
    answers: dict[int, Answer] = {}
    while True:
        ranks.report_deaths(store)
        for rank in range(world):
            # A rank whose process died after its answer answers anew.
            if store.check([f"answer/{rank}"]) and not (rank in answers and answers[rank].died):
                answers[rank] = Answer.from_json(store.get(f"answer/{rank}"))
        now = time.monotonic()
        failed = any(answer.failure for answer in answers.values())
        noticed = noticed or (now if failed else 0.0)
        if len(answers) == world and not failed:
            return answers, {}
        if now > began + seconds or (noticed and now > noticed + _NOTICE_SECONDS):
            stages = {rank: int(store.get(f"stage/{rank}")) for rank in range(world) if store.check([f"stage/{rank}"])}
            return answers, cause(answers, stages, range(world), now - began)
        time.sleep(0.05)
