"""Merges that land some steps after they departed, and fragments that take turns, against one unsharded process."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from lte_scale.config.schema import Config
from lte_scale.flight import Flight
from lte_scale.traffic import run_traffic
from tests.dist.equality import BATCH, Run, train
from tests.dist.test_bytes import arrangement
from tests.dist.test_equality import assert_equal, configuration
from tests.dist.test_precision import in_precision
from tests.harness import DistributedPool
from tests.reference import Reference, head_batch

EVERY, STEPS = 6, 18


class Timing(NamedTuple):
    """Keys of `merge`; the steps trained, and whether the run ends there."""

    delay: int
    fragments: int
    local_every: int
    steps: int = STEPS
    whole: bool = True
    growth: float = 0.0


TIMINGS = [
    Timing(1, 1, 0),
    Timing(5, 1, 0),
    Timing(0, 3, 0),
    Timing(1, 3, 0),
    Timing(2, 2, 3),
    Timing(1, 1, 2, steps=17, whole=False),
    Timing(0, 2, 1),
    Timing(1, 2, 0, steps=16, whole=False),
    Timing(0, 1, 0, steps=21, growth=0.5),  # windows end at 1, 2, 3, 4, 6, 9, 13, 19, and with all layers after 21
    Timing(1, 3, 0, steps=30, whole=False, growth=0.5),
    Timing(1, 1, 2, steps=24, whole=False, growth=0.8),  # 1, 2, 3, 5, 9, 15: the last two with local merges
]
MODES = ("reset", "resetless")


def delayed(mode: str, heads: int, path: str, timing: Timing, outer: str, gather: str = "pass") -> Config:
    config = configuration(mode, heads, ("node", gather), path, timing.local_every, outer, every=EVERY)
    merge = replace(config.merge, delay=timing.delay, fragments=timing.fragments, growth=timing.growth)
    return replace(config, merge=merge)


@functools.cache
def reference(mode: str, nodes: int, heads: int, timing: Timing, outer: str) -> Reference:
    run = Reference(delayed(mode, heads, "dense", timing, outer), nodes, heads)
    run.run(timing.steps, lambda step, head: head_batch(step, head, BATCH), whole=timing.whole)
    return run


def cases() -> list[tuple[str, int, str, Timing, str, str]]:
    """All of mode x heads x path x timing; outer optimizer and gathering take turns."""
    every = itertools.product(MODES, (1, 2, 4), ("factor", "dense"), TIMINGS)
    turns = [
        ("average", "pass"),
        ("nesterov", "window"),
        ("nesterov", "pass"),
        ("average", "window"),
        ("nesterov", "pass"),
    ]
    return [(*case, *turns[number % 5]) for number, case in enumerate(every)]


@pytest.mark.parametrize(
    "case",
    cases(),
    ids=lambda c: f"{c[0]}-h{c[1]}-{c[2]}-d{c[3][0]}-f{c[3][1]}-l{c[3][2]}-g{c[3].growth}-{c[4]}-{c[5]}",
)
def test_two_nodes_of_two_ranks(pool4: DistributedPool, case: tuple[str, int, str, Timing, str, str]) -> None:
    """Weights as the reference has them, the same bits on both nodes, and the bytes that `plan` prints."""
    mode, heads, path, timing, outer, gather = case
    config = delayed(mode, heads, path, timing, outer, gather)
    outcomes = pool4.run(train, config, timing.steps, timing.whole, ranks_per_node=2)
    assert_equal(outcomes, reference(mode, 2, heads, timing, outer))
    for mine, theirs in zip(outcomes[:2], outcomes[2:], strict=True):
        for name, (start, stop, values) in mine.parts.items():
            assert theirs.parts[name][:2] == (start, stop)
            assert torch.equal(theirs.parts[name][2], values)
        for name, value in mine.replicas.items():
            assert torch.equal(theirs.replicas[name], value)
    for rank, outcome in enumerate(outcomes):
        planned = run_traffic(arrangement(config), rank, timing.steps, last=timing.whole)
        assert dict(outcome.bytes_sent) == dict(planned), f"rank {rank}"


def test_one_process_and_four_nodes(pool4: DistributedPool) -> None:
    """Without anyone to wait for the arithmetic is the same; and on four nodes of one rank."""
    timing = Timing(2, 2, 0)
    for nodes, ranks in ((1, 4), (4, 1)):
        config = delayed("reset", ranks, "auto", timing, "nesterov")
        outcomes = pool4.run(train, config, timing.steps, True, ranks_per_node=ranks)
        assert_equal(outcomes, reference("reset", nodes, ranks, timing, "nesterov"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_few_bits_stay_near_and_equal_on_all_ranks(pool4: DistributedPool, mode: str, path: str) -> None:
    """int8 with delay and fragments: a few percent of the change since the start, the same bits on both nodes."""
    timing = Timing(2, 2, 3)
    config = delayed(mode, 2, path, timing, "average")
    exact = pool4.run(train, config, STEPS, True, ranks_per_node=2)
    start = pool4.run(train, config, 0, ranks_per_node=2)
    rounded = pool4.run(train, in_precision("int8", config), STEPS, True, ranks_per_node=2)
    off = moved = 0.0
    for rank in range(4):
        for name, (_, _, values) in rounded[rank].parts.items():
            assert torch.equal(values, rounded[(rank + 2) % 4].parts[name][2])
            off += (values - exact[rank].parts[name][2]).square().sum().item()
            moved += (values - start[rank].parts[name][2]).square().sum().item()
    assert 0 < off**0.5 < 0.05 * moved**0.5


class HalfWay(Flight[Any]):
    """Falls silent after the first message."""

    def _work(self) -> None:
        next(iter(self._jobs.values()))()


def departed_with_half_a_node(rank: int, config: Config) -> tuple[str, bool, bool]:
    """What a rank of node 0 says when it lands; whether its masters and replica masters are what they were."""
    run = Run(config, timeout_seconds=5)
    with pytest.MonkeyPatch.context() as patch:
        if run.topology.node == 1:
            patch.setattr("lte_scale.merge.Flight", HalfWay)
        for step in range(1, EVERY + 1):
            run.step(step)
    if run.topology.node == 1:
        return "", True, True
    with run.merger.editable():
        before = {name: master.clone() for name, master in run.merger.outer.masters.items()}
    replicas = {name: master.clone() for name, master in run.merger.replicas.outer.masters.items()}
    said = "landed"
    try:
        run.merger.merge(EVERY + config.merge.delay)
    except RuntimeError as error:
        said = str(error)
    with run.merger.editable():
        kept = all(torch.equal(master, before[name]) for name, master in run.merger.outer.masters.items())
    return said, kept, all(torch.equal(m, replicas[n]) for n, m in run.merger.replicas.outer.masters.items())


@pytest.mark.parametrize("path", ["factor", "dense"])
def test_a_peer_lost_half_way_leaves_the_masters_as_they_were(pool4: DistributedPool, path: str) -> None:
    """Some messages have arrived, others never will: what has arrived is not applied either."""
    config = delayed("reset", 2, path, Timing(2, 1, 0), "average")
    for said, masters, replicas in pool4.run(departed_with_half_a_node, config, ranks_per_node=2)[:2]:
        assert any(word in said for word in ("Timed out", "Connection", "Read error")), said
        assert masters
        assert replicas
    pool4.close()
