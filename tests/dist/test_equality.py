"""Every distributed path against one unsharded process with the same heads and data, after five windows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lte_scale.config.schema import (
    AdaptersConfig,
    BaseConfig,
    Config,
    MergeConfig,
    OptimizerConfig,
    TopologyConfig,
    TrainConfig,
)
from tests.dist.equality import BATCH, Outcome, Run, train
from tests.harness import DistributedPool
from tests.reference import TINY, Reference, head_batch

STEPS, EVERY = 10, 2
PLACES = [("node", "pass"), ("node", "window"), ("global", "pass"), ("global", "node"), ("global", "window")]


def configuration(
    mode: str,
    heads_per_node: int,
    place: tuple[str, str],
    path: str,
    local_every: int,
    outer: str,
    state: str = "keep",
    *,
    every: int = EVERY,
) -> Config:
    # The key biases' gradient is zero but for rounding, which Adam would blow up to full steps: all the more in its
    # first steps, which restarting its state repeats.
    eps = 1e-4 if state == "keep" else 1e-2
    return Config(
        model=TINY,
        adapters=AdaptersConfig(rank=3, alpha=6, mode=mode),
        topology=TopologyConfig(heads_per_node=heads_per_node),
        base=BaseConfig(scope=place[0], gather=place[1]),
        train=TrainConfig(precision="fp32"),
        merge=MergeConfig(
            every=every,
            local_every=local_every,
            path=path,
            outer=outer,
            outer_lr=0.7 if outer == "nesterov" else 1.0,
            optimizer_state=state,
            bucket_mb=0.02,  # several messages, of uneven size
        ),
        optimizer=OptimizerConfig(lr=3e-3, replica_lr=3e-3, eps=eps, clip_norm=0.5),
    )


@functools.cache
def reference(mode: str, nodes: int, heads_per_node: int, local_every: int, outer: str, state: str) -> Reference:
    config = configuration(mode, heads_per_node, PLACES[0], "dense", local_every, outer, state)
    run = Reference(config, nodes, heads_per_node)
    run.run(STEPS, lambda step, head: head_batch(step, head, BATCH))
    return run


def joined(outcomes: list[Outcome], name: str, size: int) -> Tensor:
    """A master [size] of the parts of all ranks."""
    whole = torch.full((size,), float("nan"))
    for outcome in outcomes:
        start, stop, values = outcome.parts[name]
        whole[start:stop] = values
    return whole


def assert_equal(outcomes: list[Outcome], expected: Reference) -> None:
    def close(actual: Tensor, wanted: Tensor, name: str) -> None:
        scale = wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name

    for name, weight in expected.masters.items():
        close(joined(outcomes, name, weight.numel()), weight.flatten(), name)
    for name, value in expected.replica_masters.items():
        for outcome in outcomes:
            close(outcome.replicas[name], value.flatten(), name)


def cases() -> list[tuple[str, int, tuple[str, str], str, int, str]]:
    """All of mode x placement x place x path; outer optimizer and local merges take turns so that all pairs occur."""
    chosen = []
    for number, (mode, heads, place, path) in enumerate(
        itertools.product(("reset", "resetless"), (1, 2, 4), PLACES, ("factor", "dense"))
    ):
        outer = ("average", "nesterov")[(number + number // 2) % 2]
        chosen.append((mode, heads, place, path, 0, outer))
        if place == ("node", "pass"):
            chosen.append((mode, heads, place, path, 1, ("nesterov", "average")[(number + number // 2) % 2]))
    return chosen


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-h{c[1]}-{c[2][0]}-{c[2][1]}-{c[3]}-l{c[4]}-{c[5]}")
def test_two_nodes_of_two_ranks(pool4: DistributedPool, case: tuple[str, int, tuple[str, str], str, int, str]) -> None:
    mode, heads, _place, _path, local_every, outer = case
    outcomes = pool4.run(train, configuration(*case), STEPS, ranks_per_node=2)
    assert_equal(outcomes, reference(mode, 2, heads, local_every, outer, "keep"))


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_ranks_that_share_a_head(pool4: DistributedPool, mode: str, place: tuple[str, str]) -> None:
    """One node of four ranks with two heads: gradients are averaged over pairs."""
    outcomes = pool4.run(train, configuration(mode, 2, place, "auto", 0, "average"), STEPS, ranks_per_node=4)
    assert_equal(outcomes, reference(mode, 1, 2, 0, "average", "keep"))


@pytest.mark.parametrize("place", [PLACES[0], PLACES[4]])
def test_four_nodes_of_one_rank(pool4: DistributedPool, place: tuple[str, str]) -> None:
    outcomes = pool4.run(train, configuration("reset", 1, place, "auto", 0, "average"), STEPS, ranks_per_node=1)
    assert_equal(outcomes, reference("reset", 4, 1, 0, "average", "keep"))


@pytest.mark.parametrize("state", ["reset", "reset_b"])
def test_optimizer_state_restarted_at_merges(pool4: DistributedPool, state: str) -> None:
    config = configuration("reset", 2, PLACES[0], "dense", 1, "average", state)
    outcomes = pool4.run(train, config, STEPS, ranks_per_node=2)
    assert_equal(outcomes, reference("reset", 2, 2, 1, "average", state))


def test_the_window_gathers_once(pool4: DistributedPool) -> None:
    """`base.gather: window` sends base weights in the first step after a merge and in no other."""
    config = configuration("reset", 2, ("node", "window"), "dense", 0, "average")
    for outcome in pool4.run(train, config, STEPS, ranks_per_node=2):
        sent = [0, *outcome.base_bytes_by_step]
        gathers = [step for step in range(1, STEPS + 1) if sent[step] > sent[step - 1]]
        assert gathers == list(range(1, STEPS + 1, EVERY))


def test_all_ranks_agree_bit_for_bit(pool4: DistributedPool) -> None:
    """With scope node both nodes keep the whole master: the same bits."""
    for path in ("factor", "dense"):
        config = configuration("reset", 2, PLACES[0], path, 0, "nesterov")
        outcomes = pool4.run(train, config, STEPS, ranks_per_node=2)
        for first, second in ((0, 2), (1, 3)):
            for name, (start, _, values) in outcomes[first].parts.items():
                other_start, _, other = outcomes[second].parts[name]
                assert start == other_start
                assert torch.equal(values, other), name


class Products(TorchDispatchMode):
    """Sizes of all matrix products within."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.sizes.add(out.numel())
        return out


def merge_products(rank: int, config: Config) -> tuple[set[int], set[int], set[int]]:
    """Sizes of the products of a merge, of the parts this rank owns, and of the whole weights."""
    run = Run(config)
    run.step(1)
    with Products() as products:
        run.merger.merge(EVERY)
    parts = {sum(stop - start for start, stop in own.parts) for own in run.merger.ownership.values()}
    single = {stop - start for own in run.merger.ownership.values() for start, stop in own.parts}
    return products.sizes, parts | single, {layer.B.shape[1] * layer.A.shape[2] for layer in run.heads.linears.values()}


@pytest.mark.parametrize("place", [PLACES[0], PLACES[1], PLACES[2]])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_no_rank_forms_more_than_its_part_of_a_delta(pool4: DistributedPool, place: tuple[str, str], path: str) -> None:
    config = configuration("resetless", 2, place, path, 0, "average")
    for sizes, parts, whole in pool4.run(merge_products, config, ranks_per_node=2):
        assert sizes
        assert sizes <= parts
        assert max(sizes) <= -(-max(whole) // 2)
