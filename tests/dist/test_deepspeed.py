"""ZeRO-3 does what FSDP2 does: the same equality, traffic and checkpoints, with flat partitions instead of rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lte_scale.config.schema import Config, EngineConfig
from tests.dist import test_delay
from tests.dist.equality import Run, train
from tests.dist.test_checkpoint import (
    SAVED,
    everything,
    joined,
    load,
    loaded,
    masters_of,
    save,
    with_average,
)
from tests.dist.test_equality import EVERY, PLACES, STEPS, assert_equal, cases, configuration, merge_products, reference
from tests.harness import DistributedPool

pytest.importorskip("deepspeed")

CUT = ("compute/", "master/", "momentum/", "average/")
"""What every engine cuts in its own way."""

Case = tuple[str, int, tuple[str, str], str, int, str]


def with_deepspeed(config: Config, **options: Any) -> Config:
    return dataclasses.replace(config, engine=EngineConfig(name="deepspeed", **options))


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-h{c[1]}-{c[2][0]}-{c[2][1]}-{c[3]}-l{c[4]}-{c[5]}")
def test_two_nodes_of_two_ranks(zero4: DistributedPool, case: Case) -> None:
    mode, heads, _place, _path, local_every, outer = case
    outcomes = zero4.run(train, with_deepspeed(configuration(*case)), STEPS, ranks_per_node=2)
    assert_equal(outcomes, reference(mode, 2, heads, local_every, outer, "keep"))


@pytest.mark.parametrize("timing", test_delay.TIMINGS[3:6], ids=lambda t: f"d{t.delay}-f{t.fragments}-l{t.local_every}")
@pytest.mark.parametrize(("mode", "heads", "path"), [("reset", 2, "dense"), ("resetless", 1, "factor")])
def test_merges_under_way(zero4: DistributedPool, mode: str, heads: int, path: str, timing: test_delay.Timing) -> None:
    config = with_deepspeed(test_delay.delayed(mode, heads, path, timing, "nesterov"))
    outcomes = zero4.run(train, config, timing.steps, timing.whole, ranks_per_node=2)
    assert_equal(outcomes, test_delay.reference(mode, 2, heads, timing, "nesterov"))


@pytest.mark.parametrize("place", PLACES[:3])
def test_ranks_that_share_a_head(zero4: DistributedPool, place: tuple[str, str]) -> None:
    config = with_deepspeed(configuration("resetless", 2, place, "auto", 0, "average"))
    assert_equal(zero4.run(train, config, STEPS, ranks_per_node=4), reference("resetless", 1, 2, 0, "average", "keep"))


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2], PLACES[4]])
def test_four_nodes_of_one_rank(zero4: DistributedPool, place: tuple[str, str]) -> None:
    config = with_deepspeed(configuration("reset", 1, place, "auto", 0, "average"))
    assert_equal(zero4.run(train, config, STEPS, ranks_per_node=1), reference("reset", 4, 1, 0, "average", "keep"))


def test_one_process() -> None:
    config = with_deepspeed(configuration("reset", 4, PLACES[0], "auto", 0, "average"))
    pool = DistributedPool(1)
    try:
        assert_equal(pool.run(train, config, STEPS, ranks_per_node=1), reference("reset", 1, 4, 0, "average", "keep"))
    finally:
        pool.close()


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param({"checkpoint_activations": True}, id="checkpointing"),
        pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_switches_change_no_result(zero4: DistributedPool, switches: dict[str, Any]) -> None:
    config = with_deepspeed(configuration("reset", 2, PLACES[0], "dense", 0, "average"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **switches))
    assert_equal(zero4.run(train, config, STEPS, ranks_per_node=2), reference("reset", 2, 2, 0, "average", "keep"))


def test_offload_changes_no_result(zero4: DistributedPool) -> None:
    config = with_deepspeed(configuration("reset", 2, ("global", "pass"), "dense", 0, "average"))
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, offload="cpu"))
    assert_equal(zero4.run(train, config, STEPS, ranks_per_node=2), reference("reset", 2, 2, 0, "average", "keep"))


def test_the_window_gathers_once(zero4: DistributedPool) -> None:
    config = with_deepspeed(configuration("reset", 2, ("node", "window"), "dense", 0, "average"))
    for outcome in zero4.run(train, config, STEPS, ranks_per_node=2):
        sent = outcome.base_bytes_by_step
        gathers = [step for step in range(EVERY + 1, STEPS + 1) if sent[step - 1] > sent[step - 2]]
        assert gathers == list(range(EVERY + 1, STEPS + 1, EVERY))  # DeepSpeed records the order in the first step


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_no_rank_forms_more_than_the_rows_its_part_touches(
    zero4: DistributedPool, place: tuple[str, str], path: str
) -> None:
    config = with_deepspeed(configuration("resetless", 2, place, path, 0, "average"))
    for sizes, _, whole in zero4.run(merge_products, config, ranks_per_node=2):
        assert sizes
        assert max(sizes) <= max(whole) // 2 + 2 * 64  # two rows that it shares with its neighbours


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2], PLACES[3]])
def test_resumed_is_uninterrupted_bit_for_bit(
    zero4: DistributedPool, tmp_path: Path, mode: str, place: tuple[str, str]
) -> None:
    local = 2 if place == PLACES[0] else 0
    config = with_deepspeed(with_average(configuration(mode, 2, place, "factor", local, "nesterov", every=4)))
    ended = zero4.run(save, config, str(tmp_path), True)
    resumed = zero4.run(load, config, str(tmp_path))
    for whole, (tensors, state, _) in zip(ended, resumed, strict=True):
        assert state == {"step": SAVED}
        assert [name for name in whole if not torch.equal(whole[name], tensors[name])] == []


def after_load(
    rank: int, config: Config, directory: str
) -> tuple[dict[str, tuple[int, torch.Tensor]], dict[str, torch.Tensor]]:
    """Right after loading: this rank's parts of the masters, and what is not cut into parts."""
    run, _, _ = loaded(config, directory)
    return masters_of(run), {k: v for k, v in everything(run).items() if not k.startswith(CUT)}


@pytest.mark.parametrize("writer", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
def test_either_engine_resumes_the_other(
    zero4: DistributedPool, tmp_path: Path, writer: str, mode: str, place: tuple[str, str]
) -> None:
    local = 2 if place == PLACES[0] else 0
    fsdp = with_average(configuration(mode, 2, place, "factor", local, "nesterov", every=4))
    first, second = (fsdp, with_deepspeed(fsdp)) if writer == "fsdp" else (with_deepspeed(fsdp), fsdp)
    ended = zero4.run(save, first, str(tmp_path), False)
    before, after = (zero4.run(after_load, config, str(tmp_path)) for config in (first, second))
    theirs, ours = joined(before), joined(after)
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    for (_, one), (_, other) in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for whole, (tensors, _, _) in zip(ended, zero4.run(load, second, str(tmp_path)), strict=True):
        for name, value in whole.items():
            if not name.startswith(CUT):
                torch.testing.assert_close(tensors[name], value, rtol=1e-4, atol=1e-5, msg=name)


def moved_in_half_precision(rank: int, config: Config) -> dict[str, tuple[int, torch.Tensor]]:
    """This rank's parts of what the masters have moved by after three windows."""
    run = Run(config)
    with run.merger.editable():
        start = {name: master.clone() for name, master in run.merger.outer.masters.items()}
    for step in range(1, 3 * EVERY + 1):
        with torch.autocast("cpu", torch.bfloat16):
            run.step(step)
    with run.merger.editable():
        return {
            name: (own.own[0], run.merger.outer.masters[name] - start[name])
            for name, own in run.merger.ownership.items()
        }


@pytest.mark.parametrize("place", [PLACES[0], PLACES[3]])
def test_half_precision_moves_the_masters_as_fsdp_does(zero4: DistributedPool, place: tuple[str, str]) -> None:
    """Masters are fp32 with either engine: what bf16 partitions would lose in small merges is not lost."""
    fsdp = configuration("reset", 2, place, "dense", 0, "average")
    fsdp = dataclasses.replace(fsdp, train=dataclasses.replace(fsdp.train, precision="bf16"))
    wholes = []
    for config in (fsdp, with_deepspeed(fsdp)):
        outcomes = zero4.run(moved_in_half_precision, config, ranks_per_node=2)
        wholes.append(joined([(parts, {}, True) for parts in outcomes]))
    for name, moved in wholes[0].items():
        assert moved.norm() > 0
        assert (wholes[1][name] - moved).norm() < 0.02 * moved.norm(), name
