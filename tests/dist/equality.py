"""What the ranks run in the equality tests: LTE on real process groups, returning what each rank owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.assemble import assemble
from lte_scale.collectives import Collectives
from lte_scale.config.schema import Config
from lte_scale.topology import from_environment
from tests.reference import CLASSES, head_batch

BATCH = 4


@dataclass
class Outcome:
    """One rank's parts of the masters, the replica masters, and what it sent."""

    parts: dict[str, tuple[int, int, Tensor]]
    replicas: dict[str, Tensor]
    bytes_sent: dict[tuple[str, str], int]
    paths: dict[str, str]
    base_bytes_by_step: list[int]


class Run:
    """The pieces of a training run, put together by hand."""

    def __init__(self, config: Config, timeout_seconds: float = 60) -> None:
        self.topology = from_environment(
            config.topology.heads_per_node, nodes_per_region=config.topology.nodes_per_region
        )
        self.collectives = Collectives(self.topology, timeout_seconds=timeout_seconds)
        lte = assemble(config, CLASSES, self.collectives, torch.device("cpu"))
        self.engine, self.heads, self.merger, self.optimizer = lte.engine, lte.heads, lte.merger, lte.optimizer
        self.policy = config.merge.optimizer_state

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        share = BATCH // self.topology.ranks_per_head
        mine = slice(self.topology.head_member * share, (self.topology.head_member + 1) * share)
        batches = [head_batch(step, head, BATCH) for head in self.topology.my_heads]
        return torch.cat([x[mine] for x, _ in batches]), torch.cat([y[mine] for _, y in batches])

    def step(self, step: int, *, last: bool = False) -> None:
        images, labels = self.batch(step)
        losses = F.cross_entropy(self.engine.model(images), labels, reduction="none")
        losses_H = losses.view(len(self.heads.ids), -1).mean(1)
        losses_H.sum().backward()
        self.optimizer.step(losses_H.detach())
        if self.merger.due(step):
            self.merger.merge(step, last=last)
            self.optimizer.restart(self.policy)


def train(rank: int, config: Config, steps: int, whole: bool = False) -> Outcome:
    """`whole`: the last step ends the run."""
    run = Run(config)
    base_bytes = []
    for step in range(1, steps + 1):
        run.step(step, last=whole and step == steps)
        base_bytes.append(sum(n for (_, purpose), n in run.collectives.bytes_sent.items() if purpose == "base"))
    parts: dict[str, tuple[int, int, Tensor]] = {}
    with run.merger.editable():
        for name, own in run.merger.ownership.items():
            parts[name] = (*own.own, run.merger.outer.masters[name].clone())
    sent: dict[Any, int] = dict(run.collectives.bytes_sent)
    replicas = {name: value.clone() for name, value in run.merger.replicas.outer.masters.items()}
    return Outcome(parts, replicas, sent, dict(run.merger.paths), base_bytes)
