"""A changed bit in a master is found at the next global merge, and its rank named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lte_scale.agreement import Disagreement, check, fingerprint
from lte_scale.config.schema import Config
from tests.dist.equality import Run
from tests.dist.test_equality import configuration
from tests.harness import DistributedPool

EVERY = 2


def trained(rank: int, config: Config, damaged: int, kind: str, steps: int) -> tuple[str, bool]:
    """What a rank says after a bit has changed on rank `damaged` in the first window; whether it kept its masters."""
    run = Run(config, timeout_seconds=10)
    for step in range(1, steps):
        run.step(step)
        if step == EVERY + config.merge.delay and rank == damaged:
            with run.merger.editable():
                outer = run.merger.outer if kind == "base" else run.merger.replicas.outer
                next(iter(outer.masters.values()))[3:4].view(torch.int32).bitwise_xor_(1 << 20)
    with run.merger.editable():
        before = [master.clone() for master in run.merger.outer.masters.values()]
    try:
        run.step(steps)
    except Disagreement as error:
        with run.merger.editable():
            masters = run.merger.outer.masters.values()
            return str(error), all(torch.equal(a, b) for a, b in zip(before, masters, strict=True))
    return "", False


@pytest.mark.parametrize("kind", ["base", "replica"])
@pytest.mark.parametrize("delay", [0, 1])
def test_the_rank_is_named(pool4: DistributedPool, kind: str, delay: int) -> None:
    """Four nodes of one rank: three agree. Nothing of that merge is applied."""
    config = configuration("reset", 1, ("node", "pass"), "dense", 0, "average", every=EVERY)
    config = replace(config, merge=replace(config.merge, delay=delay))
    for said, kept in pool4.run(trained, config, 2, kind, 2 * EVERY + delay, ranks_per_node=1):
        assert said.startswith("the masters of rank 2 are not those of the other nodes: ")
        assert kept


def test_what_nodes_hold_in_parts_is_not_compared(pool4: DistributedPool) -> None:
    """Scope global: no two ranks hold the same part of a weight, but all hold the replica masters."""
    config = configuration("reset", 2, ("global", "pass"), "dense", 0, "average", every=EVERY)
    assert pool4.run(trained, config, 2, "base", 2 * EVERY, ranks_per_node=2) == [("", False)] * 4
    found = pool4.run(trained, config, 3, "replica", 2 * EVERY, ranks_per_node=4, world_size=4)
    assert found == [("", False)] * 4  # one node has nobody to compare with


def test_without_a_majority_all_are_named() -> None:
    check([7, 7], [1, 5])
    with pytest.raises(Disagreement, match=r"the masters of ranks 1, 5 are not equal"):
        check([7, 8], [1, 5])


def test_every_bit_counts() -> None:
    values = torch.randn(1000)
    expected = fingerprint([values[:500], values[500:]], torch.device("cpu"))
    assert torch.equal(fingerprint([values], torch.device("cpu")), expected)
    for bit in range(31):
        changed = values.clone()
        changed[17:18].view(torch.int32).bitwise_xor_(1 << bit)
        assert not torch.equal(fingerprint([changed], torch.device("cpu")), expected)
    changed[0] = float("nan")
    assert not torch.equal(fingerprint([changed], torch.device("cpu")), expected)
