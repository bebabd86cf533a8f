"""Records of 2 nodes x 2 ranks: what the ranks have seen, head by head, and what a node tells between merges."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lte_scale.collectives import Collectives
from lte_scale.config import load_config
from lte_scale.config.schema import Config
from lte_scale.metrics.record import Record
from lte_scale.recorder import Recorder
from lte_scale.state import Schedule, TrainState
from lte_scale.timing import Stopwatch
from lte_scale.topology import Topology
from tests.harness import DistributedPool

STEPS, BATCH = 4, 6


def loss_of(head: int, step: int) -> float:
    """Of head 1 one step is not finite, of the last head none is."""
    return math.nan if (head, step) == (1, 2) else 1.0 + head + 0.1 * step


def mean_loss(head: int) -> float:
    finite = [loss for step in range(STEPS) if math.isfinite(loss := loss_of(head, step))]
    return sum(finite) / len(finite)


@pytest.mark.parametrize("heads_per_node", [1, 2, 4])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_record_holds_the_mean_of_the_heads(
    pool4: DistributedPool, tmp_path: Path, heads_per_node: int, everywhere: bool
) -> None:
    found: list[tuple[Record, int]] = pool4.run(recorded, heads_per_node, everywhere, str(tmp_path))
    for rank, (record, crossed) in enumerate(found):
        node = rank // 2
        heads = range(node * heads_per_node, (node + 1) * heads_per_node)
        assert record.head_loss == pytest.approx([mean_loss(head) for head in heads])
        assert record.head_grad_norm == pytest.approx([2.0 * mean_loss(head) for head in heads])
        over = range(2 * heads_per_node) if everywhere else heads
        assert record.loss == pytest.approx(sum(map(mean_loss, over)) / len(over))
        assert record.grad_norm == pytest.approx(2 * record.loss)
        assert record.top1 == pytest.approx(0.5)
        assert record.heads == len(over)
        assert record.phase_seconds["data_wait"] == pytest.approx(1.5)  # rank 0 and 1 of a node waited 1 s and 2 s
        assert record.memory_peak_bytes > 1e7
        # Every rank has skipped 10 + its number; counted at global merges alone.
        assert record.skipped_steps == (46 if everywhere else 0)
        assert (crossed > 0) == everywhere
    assert found[0][0].full_rank_bytes == STEPS * 2 * (4 - 1) * 4 * 1000 // 4


def recorder_of(config: Config, collectives: Collectives) -> Recorder:
    """With as much of a merger as it asks for."""
    topology = collectives.topology
    heads = SimpleNamespace(ids=topology.my_heads, linears={"layer": nn.Identity()})
    arrangement = SimpleNamespace(shapes=SimpleNamespace(values=1000))
    merger: Any = SimpleNamespace(heads=heads, arrangement=arrangement, clock=Stopwatch(torch.device("cpu")))
    schedule = Schedule.of(config, 1000, topology.heads)
    return Recorder(config, collectives, schedule, merger, device=torch.device("cpu"), flops_per_image=lambda: 1)


def recorded(rank: int, heads_per_node: int, everywhere: bool, run_dir: str) -> tuple[Record, int]:
    topology = Topology(nodes=2, ranks_per_node=2, heads_per_node=heads_per_node, rank=rank)
    collectives = Collectives(topology)
    config = load_config(None, [f"run_dir={run_dir}", f"train.batch_size={BATCH * topology.ranks_per_head}"])
    recorder = recorder_of(config, collectives)
    for step in range(STEPS):
        losses = torch.tensor([loss_of(head, step) for head in topology.my_heads])
        correct = torch.full((topology.heads_per_rank,), BATCH / 2)
        recorder.interval.add(losses, correct, 2 * losses, BATCH * topology.heads_per_rank)
    recorder.clock._marks.append((0, "data_wait", 0.0, 1.0 + topology.local_rank))
    before = collectives.bytes_sent["inter_node", "metrics"]
    state = TrainState(step=STEPS, skipped_here=10 + rank)
    record = recorder.record(state, 1e-3, everywhere=everywhere)
    recorder.close()
    return record, collectives.bytes_sent["inter_node", "metrics"] - before


def test_a_head_without_a_finite_step_has_no_loss(pool4: DistributedPool, tmp_path: Path) -> None:
    (record,) = pool4.run(lost, str(tmp_path), world_size=1, ranks_per_node=1)
    assert math.isnan(record.head_loss[0]) and record.head_loss[1] == pytest.approx(2.0)
    assert record.loss == pytest.approx(2.0)
    assert '"head_loss": [null, 2.0]' in (tmp_path / "metrics.jsonl").read_text()


def lost(rank: int, run_dir: str) -> Record:
    topology = Topology(heads_per_node=2)
    config = load_config(None, [f"run_dir={run_dir}"])
    recorder = recorder_of(config, Collectives(topology))
    recorder.interval.add(torch.tensor([math.inf, 2.0]), torch.ones(2), torch.ones(2), 4)
    return recorder.record(TrainState(step=1), 1e-3, everywhere=False)
