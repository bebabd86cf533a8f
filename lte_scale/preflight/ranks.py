"""One rank of the all-reduce: are the sums right, and how fast is it. A process of its own, `python -m` this module.

It answers through the store, then waits to be killed: a rank that left would look like one that failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lte_scale.bandwidth import Bandwidth
from lte_scale.collectives import Collectives, Group
from lte_scale.preflight.compare import Answer
from lte_scale.preflight.place import connect, first_line
from lte_scale.topology import Topology

STAGES = ("starts", "joins", "sums", "inside", "between", "answers")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a rank is told. `seconds`: the whole all-reduce may take; `message_bytes`: at most, where links are fast."""

    topology: Topology
    address: str
    port: int
    gpu: bool
    seconds: float
    message_bytes: int
    parent: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        fields = json.loads(text)
        return Task(**{**fields, "topology": Topology(**fields["topology"])})


class WrongSumError(RuntimeError):
    """An all-reduce that gave something else than the sum."""


class Rank:
    """A rank from joining the others to its answer."""

    def __init__(self, task: Task, store: TCPStore) -> None:
        self.task, self.store, self.topology = task, store, task.topology
        self.device = torch.device("cuda", task.topology.local_rank) if task.gpu else torch.device("cpu")

    def answer(self) -> Answer:
        """Collective. Raises whatever torch.distributed does when a rank is gone."""
        self.stage("joins")
        if self.task.gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.task.gpu else "gloo",
            store=PrefixStore("ranks", self.store),
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            timeout=timedelta(seconds=self.task.seconds),
        )
        # Less than the whole: when one rank hangs, the others have to say so in time.
        self.collectives = Collectives(self.topology, timeout_seconds=self.task.seconds / 2)
        self.stage("sums")
        for group in (self.collectives.world, self.collectives.node, self.collectives.peers, self.collectives.head):
            self.check_sum(group)
        bandwidth = Bandwidth(self.collectives, self.device, self.task.message_bytes)
        self.stage("inside")
        inside = bandwidth.of(self.collectives.node)
        self.stage("between")
        return Answer(inside=inside, between=bandwidth.of(self.collectives.peers))

    def stage(self, name: str) -> None:
        self.store.set(f"stage/{self.topology.rank}", str(STAGES.index(name)))

    def check_sum(self, group: Group) -> None:
        values = torch.full((1024,), float(self.topology.rank + 1), device=self.device)
        self.collectives.all_reduce(values, group, "control")
        expected = sum(rank + 1 for rank in group.ranks)
        wrong = values[values != expected]
        if wrong.numel():
            among = f"ranks {', '.join(map(str, group.ranks))}"
            raise WrongSumError(f"got {wrong[0].item():g} from the all-reduce of {among}, expected {expected}")


def report_failure(store: TCPStore, rank: int, reason: str, *, died: bool = False) -> None:
    """Tell node 0 why a rank failed, and, by the store's own count, which was first."""
    answer = Answer(order=store.add("failures", 1), failure=reason, died=died)
    store.set(f"answer/{rank}", answer.to_json())


def main(text: str) -> None:
    """Answer for one rank and wait for the end."""
    task = Task.from_json(text)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task.parent:  # gone before it could be heard
        return
    torch.set_num_threads(1)
    # With it NCCL's waits end by an exception, which can be told, else by an abort of the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    rank = task.topology.rank
    store = connect(task.address, task.port, task.seconds)
    store.set(f"stage/{rank}", "0")
    member = Rank(task, store)
    try:
        answer = member.answer()
        store.set(f"answer/{rank}", answer.to_json())
    except Exception as error:
        report_failure(store, rank, f"failed: {first_line(error)}")
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
