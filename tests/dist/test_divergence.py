"""Heads that are withdrawn where ranks share them, and while a merge is under way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lte_scale.config.schema import Config
from lte_scale.divergence import Divergence
from tests.dist.equality import Run
from tests.dist.test_equality import configuration
from tests.harness import DistributedPool
from tests.reference import CLASSES, head_batch

EVERY, DELAY = 4, 2


def shared(rank: int, config: Config) -> tuple[list[int], dict[str, Tensor]]:
    """Alone the second rank would keep the head, and the first not."""
    run = Run(config)
    divergence = Divergence(
        run.merger, run.optimizer, run.collectives, ratio=2.0, classes=CLASSES, device=torch.device("cpu")
    )
    for step in range(1, EVERY):
        run.step(step)
    for _ in range(50):
        divergence.follow(torch.tensor([[10.0, 1.0][rank]]))
    found = divergence.before_merge(EVERY)
    return [w.head for w in found], {name: p.detach() for name, p in run.heads.parameters().items()}


def test_ranks_that_share_a_head_decide_together(pool4: DistributedPool) -> None:
    config = configuration("reset", 1, ("node", "pass"), "auto", 0, "average")
    (one, first), (two, second) = pool4.run(shared, config, ranks_per_node=2, world_size=2)
    assert one == two == [0]
    assert all(value.equal(second[name]) for name, value in first.items())


def under_way(rank: int, config: Config) -> tuple[Tensor, Tensor]:
    """Node 0 withdraws its head while a merge is under way: what it computes once that has landed, and the base."""
    run = Run(config)
    divergence = Divergence(
        run.merger, run.optimizer, run.collectives, ratio=2.0, classes=CLASSES, device=torch.device("cpu")
    )
    landing = 2 * EVERY + DELAY
    for step in range(1, landing):
        run.step(step)
    if rank == 0:
        divergence.withdraw(0, landing - 1, "")
    run.merger.merge(landing)
    images = head_batch(0, 0, 5)[0]
    with torch.no_grad():
        logits = run.engine.model(images)
        with run.merger.merged():
            return logits, run.engine.model(images)


@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_a_merge_under_way_lands_on_a_head_that_has_started_again(pool4: DistributedPool, mode: str) -> None:
    config = configuration(mode, 1, ("node", "window"), "auto", 0, "average")
    config = replace(config, merge=replace(config.merge, every=EVERY, delay=DELAY))
    withdrawn, other = pool4.run(under_way, config, ranks_per_node=1, world_size=2)
    torch.testing.assert_close(*withdrawn, rtol=1e-5, atol=1e-5)
    assert (other[0] - other[1]).abs().max() > 1e-3
