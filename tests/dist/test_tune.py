"""`merge.tune`: what it takes by itself, on a link and with steps that it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lte_scale.bandwidth import Bandwidth
from lte_scale.cli import main
from lte_scale.collectives import Collectives
from lte_scale.config import differences, load_config
from lte_scale.config.schema import Config
from lte_scale.topology import Topology
from lte_scale.tune import TUNED, tuned
from tests.harness import DistributedPool

CPU = torch.device("cpu")
MODEL = [
    "model.image_size=28",
    "model.channels=1",
    "model.num_classes=7",
    "train.batch_size=2",
    "train.precision=fp32",
    "merge.tune=true",
]
SMALL = "model.arguments={patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}"
WIDE = "model.arguments={patch_size: 14, embed_dim: 256, depth: 2, num_heads: 2}"


def measured(rank: int, overrides: list[str]) -> tuple[Config, int]:
    """What a rank takes, and the bytes that are counted as the run's."""
    collectives = Collectives(Topology(nodes=2, ranks_per_node=1, heads_per_node=1, rank=rank))
    return tuned(load_config(None, overrides), collectives, CPU), sum(collectives.bytes_sent.values())


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_where_the_link_is_fast_nothing_is_changed(
    pool4: DistributedPool, zero4: DistributedPool, tmp_path: Path, engine: str
) -> None:
    overrides = [*MODEL, SMALL, f"engine={engine}", "merge.every=500", f"run_dir={tmp_path}"]
    pool = pool4 if engine == "fsdp" else zero4
    for config, sent in pool.run(measured, overrides, world_size=2, ranks_per_node=1):
        assert config == load_config(None, overrides)
        assert sent == 0


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_where_steps_would_wait_all_ranks_take_the_same_options(
    pool4: DistributedPool, tmp_path: Path, resume: str
) -> None:
    """Twelve MB after every other step of a few milliseconds."""
    overrides = [*MODEL, WIDE, "merge.every=2", "merge.path=dense", f"run_dir={tmp_path}", f"resume={resume}"]
    (first, _), (second, _) = pool4.run(measured, overrides, world_size=2, ranks_per_node=1)
    assert first == second
    changed = {change.partition(":")[0] for change in differences(load_config(None, overrides), first)}
    assert changed and changed <= {f"merge.{name}" for name in TUNED}


@pytest.mark.parametrize("overrides", [["base={scope: global, gather: node}"], ["method=full", "data.train=x"]])
def test_what_cannot_be_delayed_is_not(pool4: DistributedPool, tmp_path: Path, overrides: list[str]) -> None:
    overrides = [*MODEL, WIDE, "merge.every=2", f"run_dir={tmp_path}", *overrides]
    (config, _), _ = pool4.run(measured, overrides, world_size=2, ranks_per_node=1)
    assert config.merge.delay == 0


def gathered_and_reduced(rank: int) -> list[float]:
    collectives = Collectives(Topology(nodes=2, ranks_per_node=1, heads_per_node=1, rank=rank))
    return [Bandwidth(collectives, CPU, 1 << 20, gather=gather).of(collectives.peers) for gather in (True, False)]


def test_all_ranks_measure_the_same_bandwidth(pool4: DistributedPool) -> None:
    """Of the slowest one."""
    first, second = pool4.run(gathered_and_reduced, world_size=2, ranks_per_node=1)
    assert first == second
    assert all(1e6 < rate < 1e11 for rate in first)


def test_a_run_that_goes_on_keeps_what_it_began_with(digits: Path, tmp_path: Path) -> None:
    run = [f"data.train={digits / 'train'}", f"run_dir={tmp_path / 'run'}", "train.batch_size=4", "metrics.port=0"]
    run += ["model.image_size=28", "model.channels=1", SMALL, "data.workers=0", "merge.every=2", "merge.tune=true"]
    (tmp_path / "run.yaml").write_text("{}")
    command = ["train", str(tmp_path / "run.yaml"), *run]
    assert main([*command, "train.duration=2", "merge.precision=int8", "merge.delay=1"]) == 0
    assert main([*command, "train.duration=4"]) == 0
    merge = load_config(tmp_path / "run" / "config.yaml").merge
    assert (merge.precision, merge.delay) == ("int8", 1)
    assert "merge.tune" in (tmp_path / "run" / "events.log").read_text()
    assert main([*command, "train.duration=6", "resume=never"]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").merge.precision == "fp32"


def test_a_resume_from_what_is_not_there_is_refused_before_anything_is_measured(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    command = ["train", str(tmp_path / "run.yaml"), f"data.train={digits / 'train'}", f"run_dir={tmp_path / 'run'}"]
    command += ["model.image_size=28", "model.channels=1", SMALL, "merge.tune=true", f"resume={tmp_path}/nowhere"]
    assert main(command) == 2
    assert capsys.readouterr().err.count("resume: ") == 1
