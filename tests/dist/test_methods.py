"""The baselines on real process groups against one process with the same heads and data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lte_scale.config.methods import translated
from lte_scale.config.schema import Config, EngineConfig
from tests.dist import test_bytes
from tests.dist.equality import BATCH, train
from tests.dist.test_equality import assert_equal, configuration
from tests.harness import DistributedPool
from tests.reference import Batch, Reference, head_batch

STEPS = 6


def of_method(method: str, heads_per_node: int) -> Config:
    outer = "nesterov" if method == "diloco" else "average"
    config = configuration("reset", heads_per_node, ("node", "pass"), "auto", 0, outer)
    return translated(replace(config, method=method, engine=EngineConfig(name="fsdp")))


def expected(config: Config, heads: int, together: int = 1) -> Reference:
    """One process of `heads` heads on a node; each has the batches of so many heads together."""
    reference = Reference(config, 1, heads)

    def batches(step: int, head: int) -> Batch:
        images, labels = zip(*(head_batch(step, head * together + i, BATCH) for i in range(together)), strict=True)
        return torch.cat(images), torch.cat(labels)

    reference.run(STEPS, batches)
    return reference


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_diloco_on_two_ranks_is_two_heads_in_one_process(pool4: DistributedPool, ranks_per_node: int) -> None:
    config = of_method("diloco", 0)
    assert_equal(pool4.run(train, config, STEPS, ranks_per_node=ranks_per_node, world_size=2), expected(config, 2))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_ranks_that_share_a_head(pool4: DistributedPool, method: str) -> None:
    """Each takes half of the head's batch."""
    config = of_method(method, 1)
    assert_equal(pool4.run(train, config, STEPS, ranks_per_node=2, world_size=2), expected(config, 1))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_nodes_are_one_process_with_the_batches_of_both(pool4: DistributedPool, method: str) -> None:
    config = of_method(method, 0)
    assert_equal(pool4.run(train, config, STEPS, ranks_per_node=1, world_size=2), expected(config, 1, together=2))


def test_two_nodes_begin_anew_alike(pool4: DistributedPool) -> None:
    first, second = pool4.run(train, of_method("relora", 0), STEPS, ranks_per_node=1, world_size=2)
    assert all(value.equal(second.replicas[name]) for name, value in first.replicas.items())
    assert first.parts and all(part.equal(second.parts[name][2]) for name, (_, _, part) in first.parts.items())


@pytest.mark.parametrize("method", ["full", "diloco", "lora"])
def test_bytes_equal_plan(pool4: DistributedPool, method: str) -> None:
    test_bytes.assert_equal(pool4, translated(replace(test_bytes.configuration(heads=2), method=method)))
