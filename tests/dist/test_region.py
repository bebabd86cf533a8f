"""Merges among the nodes of a region, between those of all: four nodes, two regions, against one unsharded process."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from lte_scale.config.schema import Config
from lte_scale.memory import unsent_values
from lte_scale.topology import Topology
from lte_scale.traffic import run_traffic
from tests.dist.equality import BATCH, Outcome, Run, train
from tests.dist.test_bytes import arrangement
from tests.dist.test_checkpoint import assert_resumed_is_uninterrupted
from tests.dist.test_equality import assert_equal, configuration
from tests.dist.test_precision import in_precision
from tests.harness import DistributedPool
from tests.reference import Reference, head_batch

NODES, REGION = 4, 2


class Timing(NamedTuple):
    """Keys of `merge`, and the steps trained."""

    every: int
    region_every: int
    local_every: int
    steps: int
    delay: int = 0
    fragments: int = 1
    growth: float = 0.0


TIMINGS = [
    Timing(6, 3, 0, 18),
    Timing(8, 4, 2, 24),
    Timing(8, 2, 1, 22, fragments=2),
    Timing(6, 2, 0, 21, delay=1),
    Timing(6, 2, 0, 24, growth=0.7),
]


def regional(mode: str, heads: int, path: str, timing: Timing, outer: str, precision: str = "fp32") -> Config:
    config = configuration(mode, heads, ("node", "pass"), path, timing.local_every, outer, every=timing.every)
    merge = replace(
        config.merge,
        region_every=timing.region_every,
        region_precision=precision,
        delay=timing.delay,
        fragments=timing.fragments,
        growth=timing.growth,
    )
    return replace(config, merge=merge, topology=replace(config.topology, nodes_per_region=REGION))


@functools.cache
def reference(mode: str, heads: int, timing: Timing, outer: str) -> Reference:
    run = Reference(regional(mode, heads, "dense", timing, outer), NODES, heads)
    run.run(timing.steps, lambda step, head: head_batch(step, head, BATCH), whole=True)
    return run


def assert_bytes(config: Config, outcomes: list[Outcome], steps: int) -> None:
    for rank, outcome in enumerate(outcomes):
        assert dict(outcome.bytes_sent) == dict(run_traffic(arrangement(config, NODES, 1), rank, steps, last=True))
        assert outcome.bytes_sent["inter_node", "merge_region"] > 0


def cases() -> list[tuple[str, int, str, Timing, str]]:
    """All of mode x heads x path x timing; the outer optimizers take turns."""
    every = itertools.product(("reset", "resetless"), (1, 2), ("factor", "dense"), TIMINGS)
    return [(*case, ("average", "nesterov")[number % 2]) for number, case in enumerate(every)]


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-h{c[1]}-{c[2]}-{'-'.join(map(str, c[3]))}-{c[4]}")
def test_four_nodes_in_two_regions(pool4: DistributedPool, case: tuple[str, int, str, Timing, str]) -> None:
    """Weights as the reference has them, the same bits on all nodes, and the bytes that `plan` prints."""
    mode, heads, path, timing, outer = case
    config = regional(mode, heads, path, timing, outer)
    outcomes = pool4.run(train, config, timing.steps, True, ranks_per_node=1)
    assert_equal(outcomes, reference(mode, heads, timing, outer))
    for other in outcomes[1:]:
        assert all(values.equal(other.parts[name][2]) for name, (_, _, values) in outcomes[0].parts.items())
        assert all(value.equal(other.replicas[name]) for name, value in outcomes[0].replicas.items())
    assert_bytes(config, outcomes, timing.steps)


def computed_with(rank: int, config: Config, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """What a rank computes with after so many steps, a head's product apart; replica parameters; unsent values."""
    run = Run(config)
    for step in range(1, steps + 1):
        run.step(step)
    with run.merger.editable() as shards:
        weights = {name: shard.clone() for name, shard in shards.items()}
    if run.merger.arrangement.folded:
        weights = {name: weight + run.merger.products.node[name] for name, weight in weights.items()}
    assert run.merger.region is not None
    unsent = sum(value.numel() for value in run.merger.region.unsent().values())
    return weights, {name: p.detach().clone() for name, p in run.heads.replicas.items()}, unsent


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_nodes_of_a_region_hold_the_same(pool4: DistributedPool, mode: str, precision: str) -> None:
    """After their merge, the same bits in any precision; other regions hold others. Memory is what `plan` says."""
    config = regional(mode, 2, "auto", TIMINGS[1], "average", precision)
    found = pool4.run(computed_with, config, 4, ranks_per_node=1)
    for index in (0, 1):
        for name, value in found[0][index].items():
            assert value.equal(found[1][index][name])
            assert found[2][index][name].equal(found[3][index][name])
        assert any(not value.equal(found[2][index][name]) for name, value in found[0][index].items())
    assert found[0][2] == unsent_values(arrangement(config, NODES, 1), 0)


@pytest.mark.parametrize("path", ["factor", "dense"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_few_bits_inside_a_region_stay_near(pool4: DistributedPool, path: str, precision: str) -> None:
    """Of the change since the start a few percent: what messages miss comes later; and the bytes are those planned."""
    timing = TIMINGS[1]
    exact = pool4.run(train, regional("reset", 2, path, timing, "average"), timing.steps, True, ranks_per_node=1)
    start = pool4.run(train, regional("reset", 2, path, timing, "average"), 0, ranks_per_node=1)
    config = regional("reset", 2, path, timing, "average", precision)
    rounded = pool4.run(train, config, timing.steps, True, ranks_per_node=1)
    off = moved = 0.0
    for name, (_, _, values) in rounded[0].parts.items():
        off += (values - exact[0].parts[name][2]).square().sum().item()
        moved += (values - start[0].parts[name][2]).square().sum().item()
        assert all(values.equal(other.parts[name][2]) for other in rounded[1:])
    assert 0 < off**0.5 < 0.05 * moved**0.5
    assert_bytes(config, rounded, timing.steps)


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("heads", [1, 2])
def test_resumed_is_uninterrupted_bit_for_bit(pool4: DistributedPool, tmp_path: Path, mode: str, heads: int) -> None:
    """Saved after a merge of the regions in few bits, before one of all."""
    config = in_precision("int8", regional(mode, heads, "auto", TIMINGS[1], "nesterov", "int8"))
    assert_resumed_is_uninterrupted(pool4, tmp_path, config, ranks_per_node=1)


def test_one_region_of_all_nodes_is_two_levels(pool4: DistributedPool) -> None:
    """Four nodes that are one region train as one node of four heads with local merges does."""
    timing = Timing(6, 3, 0, 18)
    config = regional("reset", 1, "dense", timing, "average")
    whole = replace(config, topology=replace(config.topology, nodes_per_region=NODES))
    outcomes = pool4.run(train, whole, timing.steps, True, ranks_per_node=1)
    node = configuration("reset", 4, ("node", "pass"), "dense", 3, "average", every=6)
    expected = Reference(node, 1, 4)
    expected.run(timing.steps, lambda step, head: head_batch(step, head, BATCH), whole=True)
    assert_equal(outcomes, expected)


def test_regions_must_divide_the_nodes() -> None:
    with pytest.raises(ValueError, match=r"topology.nodes_per_region: 3 does not divide 4 nodes"):
        Topology(nodes=4, nodes_per_region=3)
    assert [Topology(nodes=4, nodes_per_region=2).region_peers(node, 0) for node in range(4)] == 2 * [[0, 1]] + 2 * [
        [2, 3]
    ]
