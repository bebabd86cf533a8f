"""Bytes sent and held on real process groups, 2 nodes x 2 ranks, equal what `plan` computes: exactly, rank by rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket
from lte_scale.collectives import Scope
from lte_scale.config.schema import AdaptersConfig, BaseConfig, Config, MergeConfig, TopologyConfig, TrainConfig
from lte_scale.cost import shapes_of
from lte_scale.memory import memory
from lte_scale.model import attach, build
from lte_scale.topology import Topology
from lte_scale.traffic import gather_traffic, run_traffic, step_traffic, times
from tests.dist.equality import Outcome, Run, train
from tests.reference import CLASSES, TINY

NODES, RANKS = 2, 2
EVERY, STEPS = 4, 5
BASES = [("node", "pass"), ("node", "window"), ("global", "pass"), ("global", "node"), ("global", "window")]
BLOCKS = ("blocks.0", "blocks.1")


def configuration(
    *,
    heads: int = 2,
    scope: str = "node",
    gather: str = "pass",
    path: str = "auto",
    mode: str = "reset",
    local_every: int = 0,
    bucket_mb: float = 64.0,
    precision: str = "fp32",
    sent: str = "fp32",
) -> Config:
    return Config(
        model=TINY,
        adapters=AdaptersConfig(rank=2, alpha=4.0, mode=mode),
        topology=TopologyConfig(heads_per_node=heads),
        base=BaseConfig(scope=scope, gather=gather),
        merge=MergeConfig(every=EVERY, local_every=local_every, path=path, bucket_mb=bucket_mb, precision=sent),
        train=TrainConfig(precision=precision),
    )


def arrangement(config: Config, nodes: int = NODES, ranks_per_node: int = RANKS) -> Arrangement:
    topology = Topology(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        heads_per_node=config.topology.heads_per_node,
        nodes_per_region=config.topology.nodes_per_region,
    )
    model = build(config.model, CLASSES, seed=0)
    heads = attach(model, config.adapters, topology.my_heads, seed=0)
    return Arrangement(shapes_of(heads, BLOCKS), topology, config)


def measured(pool4: Any, config: Config, steps: int = STEPS) -> list[Outcome]:
    outcomes: list[Outcome] = pool4.run(train, config, steps, ranks_per_node=RANKS)
    return outcomes


def assert_equal(pool4: Any, config: Config) -> None:
    """By scope and purpose on every rank, and so summed over each node; and the paths are those planned."""
    a = arrangement(config)
    for rank, outcome in enumerate(measured(pool4, config)):
        assert outcome.paths == a.paths
        assert dict(outcome.bytes_sent) == dict(run_traffic(a, rank, STEPS)), f"rank {rank}"


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("scope", "gather"), BASES)
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_bytes_equal_plan(pool4: Any, heads: int, scope: str, gather: str, mode: str, path: str) -> None:
    assert_equal(pool4, configuration(heads=heads, scope=scope, gather=gather, mode=mode, path=path))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("gather", ["pass", "window"])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_bytes_equal_plan_with_local_merges(pool4: Any, heads: int, gather: str, mode: str, path: str) -> None:
    assert_equal(pool4, configuration(heads=heads, gather=gather, mode=mode, path=path, local_every=2))


@pytest.mark.parametrize("sent", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("scope", "gather", "local_every"), [*((*base, 0) for base in BASES), ("node", "pass", 2)])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_bytes_equal_plan_in_few_bits(
    pool4: Any, sent: str, scope: str, gather: str, local_every: int, path: str
) -> None:
    for heads, mode in ((1, "resetless"), (2, "reset")) if path == "factor" else ((4, "reset"),):
        config = configuration(
            heads=heads, scope=scope, gather=gather, mode=mode, path=path, local_every=local_every, sent=sent
        )
        assert_equal(pool4, config)


@pytest.mark.parametrize(("sent", "ratio"), [("bf16", 2.0), ("int8", 3.8), ("int4", 7.3)])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_few_bits_are_fewer_bytes_between_nodes(sent: str, ratio: float, path: str) -> None:
    """Of a window with every part of a merge; the scales of blocks and the last block's room take a little."""
    whole, small = (
        run_traffic(
            arrangement(configuration(mode="resetless", gather="node", scope="global", path=path, sent=s)), 0, 4
        )
        for s in ("fp32", sent)
    )
    of = [sum(n for (scope, _), n in traffic.items() if scope == "inter_node") for traffic in (whole, small)]
    assert of[0] / of[1] == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("scope", ["node", "global"])
def test_bytes_equal_plan_in_small_messages_on_mixed_paths(pool4: Any, scope: str) -> None:
    config = configuration(scope=scope, bucket_mb=0.004)
    config = replace(config, adapters=AdaptersConfig(rank=2, rank_by_layer={"blocks.*.mlp.*": 16}))
    a = arrangement(config)
    assert set(a.paths.values()) == {"factor", "dense"}
    assert len(a.buckets) > 2
    assert_equal(pool4, config)


def held(rank: int, config: Config) -> dict[str, int]:
    """Bytes of the tensors a rank keeps, under the names of `Memory`."""
    run = Run(config)
    merger, outers = run.merger, (run.merger.outer, run.merger.replicas.outer)
    for step in range(1, EVERY):
        run.step(step)
    history = [packed for kept in merger.history.values() for packed in kept]
    run.step(EVERY)
    images, labels = run.batch(EVERY + 1)
    F.cross_entropy(run.engine.model(images), labels).backward()
    parameters = run.heads.parameters().values()
    layers = run.heads.linears.values()
    with merger.editable() as shards:
        compute = list(shards.values()) if merger.arrangement.separate else []
    feedbacks = [*merger.dense.feedback.values(), merger.replicas.feedback]
    kept: dict[str, list[Tensor | None]] = {
        "master": [t for outer in outers for t in outer.masters.values()],
        "momentum": [t for outer in outers for t in outer.momenta.values()],
        "compute_shards": [*compute],
        "factors": [*run.heads.factor_parameters().values()],
        "previous_factors": [t for layer in layers for t in (layer.A_prev, layer.B_prev)],
        "products": [*merger.products.node.values(), *merger.products.mean.values()],
        "replicas": [*run.heads.replicas.values()],
        "gradients": [parameter.grad for parameter in parameters],
        "optimizer_state": [t for parameter in parameters for t in run.optimizer.moments(parameter).values()],
        "merge_history": [*history],
        "unsent": [t for f in feedbacks if f is not None for t in (f.unsent, f.unshared)],
    }
    return {name: sum(t.nbytes for t in tensors if t is not None) for name, tensors in kept.items()}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("scope", "gather", "local_every"),
    [("node", "pass", 2), ("node", "window", 0), ("global", "pass", 0), ("global", "node", 0)],
)
@pytest.mark.parametrize(("mode", "path"), [("reset", "factor"), ("resetless", "factor"), ("resetless", "dense")])
def test_memory_equals_plan(
    pool4: Any, heads: int, scope: str, gather: str, local_every: int, mode: str, path: str
) -> None:
    config = configuration(heads=heads, scope=scope, gather=gather, mode=mode, path=path, local_every=local_every)
    config = replace(config, merge=replace(config.merge, outer="nesterov"))
    planned = memory(arrangement(config), activations=0)
    found = pool4.run(held, config, ranks_per_node=RANKS)[0]
    assert found == {name: getattr(planned, name) for name in found}


@pytest.mark.parametrize(("scope", "gather"), BASES[:4])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_memory_equals_plan_in_few_bits(pool4: Any, scope: str, gather: str, path: str) -> None:
    config = configuration(
        heads=1, scope=scope, gather=gather, mode="resetless", path=path, sent="int8", bucket_mb=0.004
    )
    planned = memory(arrangement(config), activations=0)
    assert planned.unsent > 0
    found = pool4.run(held, config, ranks_per_node=RANKS)[0]
    assert found == {name: getattr(planned, name) for name in found}


def messages(rank: int, config: Config) -> list[Bucket]:
    return Run(config).merger.buckets


def test_uneven_shards_leave_all_ranks_with_the_same_messages(pool4: Any) -> None:
    """7 rows on 2 ranks: the last weight would fit into the last message of the rank with 3 rows alone."""
    config = configuration(heads=1, path="dense", bucket_mb=0.0049)
    for found in pool4.run(messages, config, ranks_per_node=RANKS):
        assert found == arrangement(config).buckets


def forward_and_backward_in_bf16(rank: int, config: Config) -> dict[tuple[Scope, str], int]:
    run = Run(config)
    images, labels = run.batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run.engine.model(images)
    F.cross_entropy(logits.float(), labels).backward()
    return dict(run.collectives.bytes_sent)


@pytest.mark.parametrize("scope", ["node", "global"])
def test_bf16_gathers_half_the_bytes(pool4: Any, scope: str) -> None:
    config = configuration(scope=scope, precision="bf16")
    a = arrangement(config)
    whole = arrangement(configuration(scope=scope))
    for rank, sent in enumerate(pool4.run(forward_and_backward_in_bf16, config, ranks_per_node=RANKS)):
        assert sent == dict(times(gather_traffic(a, rank), 2))
        assert sum(sent.values()) * 2 == sum(step_traffic(whole, rank).values())


@pytest.mark.parametrize(
    ("scope", "gather", "local_every"),
    [
        ("node", "pass", 0),
        ("node", "pass", 2),
        ("node", "window", 2),
        ("global", "node", 0),
        ("global", "window", 0),
    ],
)
def test_nothing_crosses_nodes_between_merges(pool4: Any, scope: str, gather: str, local_every: int) -> None:
    config = configuration(scope=scope, gather=gather, local_every=local_every)
    for outcome in measured(pool4, config, EVERY - 1):
        assert sum(outcome.bytes_sent.values()) > 0
        assert [key for key in outcome.bytes_sent if key[0] == "inter_node"] == []
    merged = Counter[str]()
    for outcome in measured(pool4, config, EVERY):
        merged.update({scope: sent for (scope, _), sent in outcome.bytes_sent.items()})
    assert merged["inter_node"] > 0


def test_scope_global_with_gather_pass_crosses_nodes_in_every_step(pool4: Any) -> None:
    outcomes = measured(pool4, configuration(scope="global", gather="pass"), EVERY - 1)
    assert sum(outcome.bytes_sent.get(("inter_node", "base"), 0) for outcome in outcomes) > 0


@pytest.mark.parametrize(("scope", "local_every"), [("node", 0), ("node", 2), ("global", 0)])
def test_gather_window_gathers_once_per_window(pool4: Any, scope: str, local_every: int) -> None:
    outcomes = measured(pool4, configuration(scope=scope, gather="window", local_every=local_every))
    window = local_every or EVERY
    for outcome in outcomes:
        sent = [0, *outcome.base_bytes_by_step]
        grew = [step for step, (before, after) in enumerate(pairwise(sent), 1) if after > before]
        assert grew == list(range(1, STEPS + 1, window))
