"""Save in the middle of a window, rebuild everything, load: bit for bit the uninterrupted run. Other topologies too."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_scale.checkpoint import Checkpoints
from lte_scale.config.schema import CheckpointConfig, Config
from lte_scale.contents import Pieces
from lte_scale.run_dir import whole_checkpoints
from tests.dist.equality import Run
from tests.dist.test_equality import PLACES, configuration
from tests.harness import DistributedPool

SAVED, LAST = 7, 12  # windows of 4 steps, local merges every 2: in the middle of both


def pieces_of(run: Run) -> Pieces:
    return Pieces(run.heads, run.merger, run.optimizer, dict.fromkeys(run.heads.ids, 0))


def everything(run: Run) -> dict[str, Tensor]:
    """All that training depends on, of this rank."""
    found = {name: p.detach().clone() for name, p in run.heads.parameters().items()}
    with run.merger.editable() as shards:
        found |= {f"compute/{name}": shard.clone() for name, shard in shards.items()}
        found |= {f"master/{name}": master.clone() for name, master in run.merger.outer.masters.items()}
    found |= {f"momentum/{name}": value.clone() for name, value in run.merger.outer.momenta.items()}
    found |= {f"average/{name}": value.clone() for name, value in run.merger.outer.averages.items()}
    found |= {f"replica/{name}": value.clone() for name, value in run.merger.replicas.outer.masters.items()}
    found |= {f"unsent/{name}": value.clone() for name, value in run.merger.dense.unsent().items()}
    if run.merger.region is not None:
        found |= {f"unsent/region/{name}": value.clone() for name, value in run.merger.region.unsent().items()}
    if (feedback := run.merger.replicas.feedback) is not None:
        found |= {"unsent": feedback.unsent.clone(), "unshared": feedback.unshared.clone()}
    for name, parameter in run.heads.parameters().items():
        found |= {f"{name}/{kind}": value.clone() for kind, value in run.optimizer.moments(parameter).items()}
    return found


def save(rank: int, config: Config, directory: str, asynchronous: bool) -> dict[str, Tensor]:
    """Train to the end, saving on the way while training goes on; returns the end."""
    run = Run(config)
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(asynchronous=asynchronous), run.collectives)
    for step in range(1, LAST + 1):
        run.step(step)
        if step == SAVED:
            pieces = pieces_of(run)
            pieces.positions.update({head: 10 * head for head in run.heads.ids})
            checkpoints.save(pieces, {"step": step}, "text\n", top1=None, wait=False)
    checkpoints.close()
    return everything(run)


def loaded(config: Config, directory: str) -> tuple[Run, dict[str, object], dict[int, int]]:
    """Everything built anew, with what the newest checkpoint holds; the trainer's state, the positions."""
    run = Run(config)
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(), run.collectives)
    found = checkpoints.find("auto")
    assert found is not None
    pieces = pieces_of(run)
    state = checkpoints.load(found, pieces)
    checkpoints.close()
    return run, state, pieces.positions


def load(rank: int, config: Config, directory: str) -> tuple[dict[str, Tensor], dict[str, object], dict[int, int]]:
    run, state, positions = loaded(config, directory)
    for step in range(SAVED + 1, LAST + 1):
        run.step(step)
    return everything(run), state, positions


def with_average(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=0.5))


def in_precision(precision: str, config: Config) -> Config:
    return dataclasses.replace(config, merge=dataclasses.replace(config.merge, precision=precision))


CASES = [
    *itertools.product(["reset", "resetless"], [1, 2, 4], [PLACES[0]], ["factor"], [2], ["nesterov"]),
    *itertools.product(["reset", "resetless"], [1, 2], [PLACES[0]], ["dense"], [2], ["average"]),
    *itertools.product(["reset", "resetless"], [1, 2], PLACES[1:], ["factor"], [0], ["nesterov"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-h{c[1]}-{c[2][0]}-{c[2][1]}-{c[3]}-l{c[4]}-{c[5]}")
def test_resumed_is_uninterrupted_bit_for_bit(
    pool4: DistributedPool, tmp_path: Path, case: tuple[str, int, tuple[str, str], str, int, str]
) -> None:
    assert_resumed_is_uninterrupted(pool4, tmp_path, with_average(configuration(*case, every=4)))


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize(("heads", "place", "path", "local_every"), [
    (1, PLACES[0], "factor", 2),
    (2, PLACES[0], "dense", 2),
    (1, PLACES[3], "factor", 0),
    (2, PLACES[3], "dense", 0),
    (2, PLACES[2], "dense", 0),
])  # fmt: skip
def test_resumed_in_few_bits_is_uninterrupted_bit_for_bit(
    pool4: DistributedPool, tmp_path: Path, mode: str, heads: int, place: tuple[str, str], path: str, local_every: int
) -> None:
    config = in_precision("int4", configuration(mode, heads, place, path, local_every, "nesterov", every=4))
    assert_resumed_is_uninterrupted(pool4, tmp_path, with_average(config))


def assert_resumed_is_uninterrupted(
    pool4: DistributedPool, tmp_path: Path, config: Config, ranks_per_node: int = 2
) -> None:
    ended = pool4.run(save, config, str(tmp_path), True, ranks_per_node=ranks_per_node)
    resumed = pool4.run(load, config, str(tmp_path), ranks_per_node=ranks_per_node)
    for rank, (whole, (tensors, state, positions)) in enumerate(zip(ended, resumed, strict=True)):
        assert state == {"step": SAVED}
        assert positions == {head: 10 * head for head in positions}
        assert whole.keys() == tensors.keys()
        differing = [name for name in whole if not torch.equal(whole[name], tensors[name])]
        assert differing == [], f"rank {rank}"


def masters_of(run: Run) -> dict[str, tuple[int, Tensor]]:
    """Where this rank's part of every master begins, and the part."""
    with run.merger.editable():
        return {n: (own.own[0], run.merger.outer.masters[n].clone()) for n, own in run.merger.ownership.items()}


def masters_after_load(
    rank: int, config: Config, directory: str
) -> tuple[dict[str, tuple[int, Tensor]], dict[str, Tensor], bool]:
    run, _, _ = loaded(config, directory)
    parts = masters_of(run)
    run.step(1)
    heads = {f"{h}/{n}": layer.A[i].detach().clone() for n, layer in run.heads.linears.items()
             for i, h in enumerate(run.heads.ids)}  # fmt: skip
    zero = all(not layer.B_prev.any() for layer in run.heads.linears.values() if layer.B_prev is not None)
    return parts, heads, zero


def joined(outcomes: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """The masters, where every rank's outcome begins with its `masters_of`."""
    whole: dict[str, dict[int, Tensor]] = {}
    for parts, *_ in outcomes:
        for name, (start, values) in parts.items():
            whole.setdefault(name, {})[start] = values
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in whole.items()}


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize(("world", "per_node", "heads"), [(2, 2, 4), (1, 1, 4), (4, 4, 2), (2, 1, 1)])
def test_another_number_of_ranks_loads_the_same_base(
    pool4: DistributedPool, tmp_path: Path, mode: str, world: int, per_node: int, heads: int
) -> None:
    config = configuration(mode, 2, ("global", "pass"), "dense", 0, "nesterov")
    pool4.run(save, config, str(tmp_path), False)
    before = joined(pool4.run(masters_after_load, config, str(tmp_path)))
    other = dataclasses.replace(configuration(mode, heads, ("node", "pass"), "dense", 0, "nesterov"), seed=config.seed)
    outcomes = pool4.run(masters_after_load, other, str(tmp_path), world_size=world, ranks_per_node=per_node)
    after = joined(outcomes)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name


@pytest.mark.parametrize("place", [PLACES[0], PLACES[3]])
def test_in_few_bits_too_another_number_of_nodes_loads_the_same_base(
    pool4: DistributedPool, tmp_path: Path, place: tuple[str, str]
) -> None:
    """What the two nodes had not sent yet means nothing to four, and is dropped."""
    config = in_precision("int8", configuration("reset", 2, place, "dense", 0, "nesterov"))
    pool4.run(save, config, str(tmp_path), False)
    before = joined(pool4.run(masters_after_load, config, str(tmp_path)))
    other = in_precision("int8", configuration("reset", 1, place, "dense", 0, "nesterov"))
    after = joined(pool4.run(masters_after_load, other, str(tmp_path), ranks_per_node=1))
    for name, values in before.items():
        assert torch.equal(values, after[name]), name


def test_retention_keeps_the_newest_and_the_best(pool4: DistributedPool, tmp_path: Path) -> None:
    pool4.run(save_several, configuration("reset", 2, PLACES[0], "dense", 0, "average"), str(tmp_path))
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def save_several(rank: int, config: Config, directory: str) -> None:
    run = Run(config)
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(keep_last=2), run.collectives)
    for step, top1 in enumerate([0.1, 0.9, 0.2, 0.3, None], start=1):
        run.step(step)
        checkpoints.save(pieces_of(run), {"step": step}, "", top1=top1, wait=False)
    checkpoints.close()


def test_a_failed_save_harms_nothing(pool4: DistributedPool, tmp_path: Path) -> None:
    config = configuration("reset", 2, PLACES[0], "dense", 0, "average")
    pool4.run(save, config, str(tmp_path), False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pool4.run(save_onto_a_file, config, str(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def save_onto_a_file(rank: int, config: Config, directory: str) -> None:
    """The directory of the new checkpoint cannot be made; training goes on."""
    run = Run(config)
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(), run.collectives)
    obstacle = Path(directory) / "checkpoints" / ".tmp-step_00000001"
    if rank == 0:
        obstacle.write_text("in the way")
    run.collectives.barrier()
    run.step(1)
    checkpoints.save(pieces_of(run), {"step": 1}, "", top1=None, wait=True)
    run.step(2)
    checkpoints.close()
    run.collectives.barrier()
    if rank == 0:
        obstacle.unlink(missing_ok=True)


def refuse(rank: int, config: Config, directory: str) -> str:
    run = Run(config)
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(), run.collectives)
    found = checkpoints.find("auto")
    assert found is not None
    try:
        checkpoints.load(found, pieces_of(run))
    except ValueError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "loaded"


def test_another_model_or_rank_is_refused(pool4: DistributedPool, tmp_path: Path) -> None:
    config = configuration("reset", 2, PLACES[0], "dense", 0, "average")
    pool4.run(save, config, str(tmp_path), False)
    other = dataclasses.replace(config, adapters=dataclasses.replace(config.adapters, rank=2))
    for message in pool4.run(refuse, other, str(tmp_path)):
        assert "another model or rank: head/0/" in message
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match="assert found is not None"):
        pool4.run(refuse, config, str(tmp_path))
