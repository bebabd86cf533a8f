"""The base held in few bits on real process groups: one unsharded process's weights, plan's bytes, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lte_scale.config.schema import BaseConfig, Config
from lte_scale.memory import memory
from lte_scale.traffic import run_traffic
from tests.dist import test_bytes
from tests.dist.equality import BATCH, Run, train
from tests.dist.test_checkpoint import assert_resumed_is_uninterrupted, load, save, with_average
from tests.dist.test_equality import assert_equal, configuration, joined
from tests.harness import DistributedPool
from tests.reference import Reference, head_batch

STEPS = 6  # three windows


def held_in(precision: str, config: Config) -> Config:
    return replace(config, base=replace(config.base, precision=precision))


@pytest.mark.parametrize(
    ("precision", "mode", "place", "nodes", "ranks", "heads", "local_every"),
    [
        ("int8", "reset", ("node", "pass"), 1, 2, 2, 0),
        ("nf4", "reset", ("node", "window"), 1, 2, 2, 0),
        ("nf4", "resetless", ("node", "pass"), 1, 2, 4, 0),
        ("nf4", "reset", ("global", "pass"), 2, 1, 1, 0),
        ("int8", "reset", ("global", "node"), 2, 2, 2, 0),
        ("nf4", "reset", ("node", "pass"), 2, 2, 1, 1),
    ],
)
def test_training_equals_one_unsharded_process_with_the_same_base(
    pool4: DistributedPool,
    precision: str,
    mode: str,
    place: tuple[str, str],
    nodes: int,
    ranks: int,
    heads: int,
    local_every: int,
) -> None:
    """To fp32 rounding over a window; then a weight between two levels may be rounded to either: near, over three."""
    config = held_in(precision, configuration(mode, heads, place, "auto", local_every, "nesterov"))
    for steps in (config.merge.every, STEPS):
        outcomes = pool4.run(train, config, steps, ranks_per_node=ranks, world_size=nodes * ranks)
        expected, plain = (Reference(c, nodes, heads) for c in (config, held_in("auto", config)))
        for run in (expected, plain):
            run.run(steps, lambda step, head: head_batch(step, head, BATCH))
        if steps == config.merge.every:
            assert_equal(outcomes, expected)
    for name, weight in expected.masters.items():
        changed = (plain.masters[name] - weight).norm()
        assert changed > 1e-3 * weight.norm()  # what is quantised makes a difference
        assert (joined(outcomes, name, weight.numel()) - weight.flatten()).norm() < 0.05 * changed, name


@pytest.mark.parametrize(
    ("scope", "gather", "mode"), [("node", "pass", "reset"), ("node", "window", "reset"), ("global", "node", "reset")]
)
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_bytes_equal_plan(pool4: DistributedPool, precision: str, scope: str, gather: str, mode: str) -> None:
    test_bytes.assert_equal(pool4, held_in(precision, test_bytes.configuration(scope=scope, gather=gather, mode=mode)))


def evaluated(rank: int, config: Config) -> Tensor:
    """What the merged model answers."""
    run = Run(config)
    images, _ = head_batch(1, 0, 3)
    with torch.no_grad(), run.merger.merged():
        answer: Tensor = run.engine.model(images)
    return answer


@pytest.mark.parametrize("place", [("node", "pass"), ("global", "window")])
def test_the_merged_model_is_that_of_the_master(pool4: DistributedPool, place: tuple[str, str]) -> None:
    config = configuration("reset", 2, place, "auto", 0, "average")
    for answers in zip(
        *(pool4.run(evaluated, held_in(p, config), ranks_per_node=2) for p in ("auto", "nf4")), strict=True
    ):
        torch.testing.assert_close(*answers)


def test_few_bits_are_fewer_bytes_gathered() -> None:
    config = replace(test_bytes.configuration(), base=BaseConfig())
    wide = replace(config.model, arguments={**config.model.arguments, "embed_dim": 128})
    sent = {}
    for precision in ("auto", "int8", "nf4"):
        a = test_bytes.arrangement(held_in(precision, replace(config, model=wide)))
        sent[precision] = run_traffic(a, 0, 1)["intra_node", "base"]
    assert sent["auto"] / sent["int8"] == pytest.approx(32 / 8.25, rel=0.01)
    assert sent["auto"] / sent["nf4"] == pytest.approx(32 / 4.25, rel=0.01)


def held(rank: int, config: Config) -> tuple[dict[str, int], int, int]:
    """As `test_bytes.held`, and of the base: bytes of its parts as they are gathered, and of all when gathered."""
    run = Run(config)
    weights = [layer.base.weight for layer in run.heads.linears.values()]
    kept = sum(weight.to_local().nbytes for weight in weights)  # type: ignore[attr-defined]
    run.step(1)
    with torch.no_grad():
        for unit in run.engine.units:  # type: ignore[attr-defined]
            unit.unshard()
        whole = sum(layer.base.weight.nbytes for layer in run.heads.linears.values())
    return test_bytes.held(rank, config), kept, whole


@pytest.mark.parametrize(("scope", "gather"), [("node", "window"), ("global", "window")])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_memory_equals_plan(pool4: DistributedPool, precision: str, scope: str, gather: str) -> None:
    config = held_in(precision, test_bytes.configuration(scope=scope, gather=gather))
    planned = memory(test_bytes.arrangement(config), activations=0)
    found, kept, whole = pool4.run(held, config, ranks_per_node=2)[0]
    assert found == {name: getattr(planned, name) for name in found}
    assert kept == planned.partitions
    assert whole == pytest.approx(planned.gathered, rel=0.05)  # which counts the padding of uneven shards


@pytest.mark.parametrize(("precision", "mode", "heads", "local_every"), [
    ("nf4", "reset", 2, 2),
    ("int8", "resetless", 1, 0),
])  # fmt: skip
def test_resumed_is_uninterrupted_bit_for_bit(
    pool4: DistributedPool, tmp_path: Path, precision: str, mode: str, heads: int, local_every: int
) -> None:
    config = configuration(mode, heads, ("node", "pass"), "dense", local_every, "nesterov", every=4)
    assert_resumed_is_uninterrupted(pool4, tmp_path, with_average(held_in(precision, config)))


def loaded_parts(rank: int, config: Config, directory: str) -> dict[str, Tensor]:
    tensors, _, _ = load(rank, config, directory)
    return {name: value for name, value in tensors.items() if name.startswith(("master/", "momentum/"))}


@pytest.mark.parametrize(("before", "after"), [("auto", "nf4"), ("nf4", "auto"), ("nf4", "int8")])
def test_a_checkpoint_goes_on_in_another_precision(
    pool4: DistributedPool, tmp_path: Path, before: str, after: str
) -> None:
    """A save holds the fp32 master alone: what a run loads it as does not change it, and it trains on."""
    config = configuration("reset", 2, ("node", "pass"), "dense", 0, "nesterov", every=4)
    pool4.run(save, held_in(before, config), str(tmp_path), False, world_size=2)
    same = pool4.run(loaded_masters, held_in(before, config), str(tmp_path), world_size=2)
    other = pool4.run(loaded_masters, held_in(after, config), str(tmp_path), world_size=2)
    for here, there in zip(same, other, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    ended = pool4.run(loaded_parts, held_in(after, config), str(tmp_path), world_size=2)
    for parts in ended:
        assert all(value.isfinite().all() for value in parts.values())


def loaded_masters(rank: int, config: Config, directory: str) -> dict[str, Tensor]:
    from tests.dist.test_checkpoint import loaded

    run, _, _ = loaded(config, directory)
    with run.merger.editable():
        return {name: value.clone() for name, value in run.merger.outer.masters.items()}
