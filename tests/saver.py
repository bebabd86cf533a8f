"""A process that trains on gradients of no meaning and saves: what the tests of checkpoints share."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lte_scale import checksums
from lte_scale.assemble import LTE, assemble
from lte_scale.checkpoint import Checkpoints
from lte_scale.collectives import Collectives
from lte_scale.config.schema import (
    AdaptersConfig,
    CheckpointConfig,
    Config,
    EngineConfig,
    MergeConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.contents import Pieces
from lte_scale.run_dir import whole_checkpoints
from lte_scale.topology import Topology
from tests.reference import CLASSES, TINY

MODEL = replace(TINY, arguments={"patch_size": 14, "embed_dim": 12, "depth": 1, "num_heads": 2})
PLAIN = Config(
    model=MODEL,
    adapters=AdaptersConfig(rank=3, alpha=6),
    topology=TopologyConfig(heads_per_node=2),
    engine=EngineConfig(name="none"),
    train=TrainConfig(precision="fp32"),
    merge=MergeConfig(every=2),
)


class Run:
    """One process that trains on gradients of no meaning and saves in `run_dir`."""

    def __init__(self, run_dir: Path, config: Config = PLAIN, classes: int = CLASSES, **checkpoint: Any) -> None:
        heads = config.topology.heads_per_node
        alone = Collectives(Topology(nodes=1, ranks_per_node=1, heads_per_node=heads))
        self.lte: LTE = assemble(config, classes, alone, torch.device("cpu"))
        self.pieces = Pieces(self.lte.heads, self.lte.merger, self.lte.optimizer, dict.fromkeys(range(heads), 0))
        self.checkpoints = Checkpoints(run_dir, CheckpointConfig(**checkpoint), alone)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            for parameter in self.lte.optimizer.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.lte.optimizer.step(torch.ones(len(self.lte.heads.ids)))
            if self.lte.merger.due(self.step):
                self.lte.merger.merge(self.step)

    def save(self, step: int, top1: float | None = None, *, wait: bool = True) -> None:
        self.checkpoints.save(self.pieces, {"step": step}, "text\n", top1=top1, wait=wait)

    def load(self, path: Path) -> None:
        self.checkpoints.load(path, self.pieces)

    def masters(self) -> dict[str, Tensor]:
        with self.lte.merger.editable():
            outer, replicas = self.lte.merger.outer.masters, self.lte.merger.replicas.outer.masters
            return {name: value.clone() for name, value in {**outer, **replicas}.items()}


def names(run_dir: Path) -> list[str]:
    return [path.name for path in whole_checkpoints(run_dir)]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def file_size_limit(path: Path) -> Iterator[None]:
    """No file may grow beyond 9 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def relist(checkpoint: Path) -> None:
    """Make the list of sums that of the files as they are now: for what else a change by hand would run into."""
    names = [path.name for path in checkpoint.iterdir() if path.name != checksums.LIST]
    (checkpoint / checksums.LIST).write_text(checksums.listed(checksums.digests(checkpoint, names)))
