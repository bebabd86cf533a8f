"""ZeRO-3's bytes on real process groups, 2 nodes x 2 ranks, equal what `plan` computes; and what a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lte_scale.arrangement import Arrangement
from lte_scale.config.schema import Config
from lte_scale.memory import memory
from lte_scale.traffic import Traffic, gather_traffic, merge_traffic, run_traffic, step_traffic, times
from tests.dist.equality import Run
from tests.dist.test_bytes import EVERY, RANKS, STEPS, arrangement, configuration, held, measured
from tests.dist.test_deepspeed import with_deepspeed
from tests.harness import DistributedPool

pytest.importorskip("deepspeed")


def assert_equal(a: Arrangement, sent: list[Traffic]) -> None:
    """To the byte; of the gathering two passes are the most: what is fetched ahead stays for the backward pass."""
    for rank, counted in enumerate(sent):
        planned = run_traffic(a, rank, STEPS)
        for key, most in planned.items():
            least = most // 2 if key[1] == "base" else most
            assert least <= counted[key] <= most, f"rank {rank}: {key}"
        assert counted.keys() == planned.keys()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("scope", "gather"), [("node", "pass"), ("global", "pass"), ("global", "node")])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_bytes_equal_plan(zero4: DistributedPool, heads: int, scope: str, gather: str, path: str) -> None:
    config = with_deepspeed(configuration(heads=heads, scope=scope, gather=gather, path=path, mode="resetless"))
    assert_equal(arrangement(config), [_traffic(outcome.bytes_sent) for outcome in measured(zero4, config)])


@pytest.mark.parametrize("scope", ["node", "global"])
def test_bytes_in_half_precision_and_with_checkpointing(zero4: DistributedPool, scope: str) -> None:
    config = with_deepspeed(configuration(scope=scope, precision="bf16"))
    config = replace(config, train=replace(config.train, checkpoint_activations=True))
    assert_equal(arrangement(config), zero4.run(sent_under_autocast, config, STEPS, ranks_per_node=RANKS))


def sent_under_autocast(rank: int, config: Config, steps: int) -> Traffic:
    run = Run(config)
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(1, steps + 1):
            run.step(step)
    return _traffic(run.collectives.bytes_sent)


def _traffic(sent: Mapping[Any, int]) -> Traffic:
    return Traffic(dict(sent))


@pytest.mark.parametrize("scope", ["node", "global"])
def test_a_window_costs_one_gather(zero4: DistributedPool, scope: str) -> None:
    """Between the first window, in which DeepSpeed learns the order of the layers, and the end of the second."""
    config = with_deepspeed(configuration(scope=scope, gather="window"))
    a = arrangement(config)
    once, twice = (measured(zero4, config, steps) for steps in (EVERY, 2 * EVERY))
    for rank, (first, both) in enumerate(zip(once, twice, strict=True)):
        expected = Traffic(gather_traffic(a, rank)) + merge_traffic(a, rank, everywhere=True)
        expected += times(step_traffic(a, rank), EVERY)
        assert {k: n - first.bytes_sent.get(k, 0) for k, n in both.bytes_sent.items()} == dict(expected)


@pytest.mark.parametrize(("scope", "gather", "local_every"), [("node", "pass", 2), ("global", "node", 0)])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_memory_equals_plan(zero4: DistributedPool, scope: str, gather: str, local_every: int, offload: str) -> None:
    config = with_deepspeed(configuration(scope=scope, gather=gather, local_every=local_every, mode="resetless"))
    config = replace(config, merge=replace(config.merge, outer="nesterov"))
    planned = memory(arrangement(config), activations=0)
    if offload == "cpu":
        config = replace(config, base=replace(config.base, offload="cpu"))
    found = zero4.run(held, config, ranks_per_node=RANKS)[0]
    assert found == {name: getattr(planned, name) for name in found}
    if offload == "cpu":
        moved = memory(arrangement(config), activations=0)
        weights = ("master", "momentum", "compute_shards", "products")
        assert moved.cpu == sum(getattr(planned, name) - getattr(moved, name) for name in weights) > 0
        assert moved.total == planned.total - moved.cpu


def partitions(rank: int, config: Config) -> int:
    engine = Run(config).engine
    return sum(weight.ds_tensor.nbytes for weight in engine.weights.values())  # type: ignore[attr-defined]


def test_partitions_in_half_precision(zero4: DistributedPool) -> None:
    config = with_deepspeed(configuration(precision="bf16"))
    planned = memory(arrangement(config), activations=0)
    assert zero4.run(partitions, config, ranks_per_node=RANKS) == [planned.partitions] * 4
