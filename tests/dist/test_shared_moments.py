"""Moments in few bits of ranks that share a head: each rounds for itself, and all have the same."""

from __future__ import annotations

import pytest
import torch

from lte_scale.config.schema import AdaptersConfig, Config, MergeConfig, OptimizerConfig, TopologyConfig, TrainConfig
from tests.dist.equality import Run
from tests.harness import DistributedPool
from tests.reference import TINY


def trained(rank: int, config: Config) -> dict[str, torch.Tensor]:
    """Factors, replica parameters and their moments after ten steps and three merges."""
    run = Run(config)
    for step in range(1, 11):
        run.step(step)
    found = {}
    with run.optimizer.decoded():
        for name, parameter in run.heads.parameters().items():
            found[name] = parameter.detach().clone()
            found |= {f"{name}/{kind}": value.clone() for kind, value in run.optimizer.moments(parameter).items()}
    return found


@pytest.mark.parametrize("moments", ["bf16", "log8"])
def test_ranks_of_a_head_stay_equal(pool4: DistributedPool, moments: str) -> None:
    config = Config(
        model=TINY,
        adapters=AdaptersConfig(rank=3, alpha=6),
        topology=TopologyConfig(heads_per_node=1),
        merge=MergeConfig(every=3, optimizer_state="reset_b"),
        optimizer=OptimizerConfig(moments=moments),
        train=TrainConfig(precision="fp32"),
    )
    ranks = pool4.run(trained, config)
    for first, second in ((0, 1), (2, 3)):
        assert all(torch.equal(value, ranks[second][name]) for name, value in ranks[first].items())
    assert any(not torch.equal(value, ranks[2][name]) for name, value in ranks[0].items())
