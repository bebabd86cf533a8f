"""Checkpoints that are torn, foreign, hostile or many: one line that names the file, nothing executed, nothing lost."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_scale.assemble import LTE, assemble
from lte_scale.checkpoint import Checkpoints, check_writable, resolve, whole_checkpoints
from lte_scale.cli import main
from lte_scale.collectives import Collectives
from lte_scale.config.schema import (
    AdaptersConfig,
    CheckpointConfig,
    Config,
    EngineConfig,
    MergeConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.contents import Pieces
from lte_scale.storage import read_metadata
from lte_scale.topology import Topology, from_environment
from tests.harness import DistributedPool
from tests.reference import CLASSES, TINY
from tests.test_train import SMALL, command

ALONE = [*SMALL, "merge={every: 4, local_every: 4}", "data.workers=0", "checkpoint={every: 4, keep_last: 3}"]
MODEL = replace(TINY, arguments={"patch_size": 14, "embed_dim": 12, "depth": 1, "num_heads": 2})
PLAIN = Config(
    model=MODEL,
    adapters=AdaptersConfig(rank=3, alpha=6),
    topology=TopologyConfig(heads_per_node=2),
    engine=EngineConfig(name="none"),
    train=TrainConfig(precision="fp32"),
    merge=MergeConfig(every=2),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards, and a run of eight steps with checkpoints after four and eight."""
    data, run_dir = tmp_path_factory.mktemp("data") / "digits", tmp_path_factory.mktemp("runs") / "run"
    assert main(["shards", "digits", str(data)]) == 0
    assert main(command(data, run_dir, *ALONE, "train.duration=8")) == 0
    return data, run_dir


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run that a test may damage."""
    shutil.copytree(trained[1], tmp_path / "run")
    return trained[0], tmp_path / "run"


class Run:
    """One process that trains on gradients of no meaning and saves in `run_dir`."""

    def __init__(self, run_dir: Path, config: Config = PLAIN, classes: int = CLASSES, **checkpoint: Any) -> None:
        heads = config.topology.heads_per_node
        alone = Collectives(Topology(nodes=1, ranks_per_node=1, heads_per_node=heads))
        self.lte: LTE = assemble(config, classes, alone, torch.device("cpu"))
        self.pieces = Pieces(self.lte.heads, self.lte.merger, self.lte.optimizer, dict.fromkeys(range(heads), 0))
        self.checkpoints = Checkpoints(run_dir, CheckpointConfig(**checkpoint), alone)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            for parameter in self.lte.optimizer.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.lte.optimizer.step(torch.ones(len(self.lte.heads.ids)))
            if self.lte.merger.due(self.step):
                self.lte.merger.merge(self.step)

    def save(self, step: int, top1: float | None = None, *, wait: bool = True) -> None:
        self.checkpoints.save(self.pieces, {"step": step}, "text\n", top1=top1, wait=wait)

    def load(self, path: Path) -> None:
        self.checkpoints.load(path, self.pieces)

    def masters(self) -> dict[str, Tensor]:
        with self.lte.merger.editable():
            outer, replicas = self.lte.merger.outer.masters, self.lte.merger.replicas.outer.masters
            return {name: value.clone() for name, value in {**outer, **replicas}.items()}


def names(run_dir: Path) -> list[str]:
    return [path.name for path in whole_checkpoints(run_dir)]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_table_of_tensors_that_would_run_code_is_refused(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = run
    table, out = whole_checkpoints(run_dir)[-1] / ".metadata", tmp_path / "out.safetensors"
    table.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for words in (command(data, run_dir, *ALONE, "train.duration=12"), ["export", str(run_dir), str(out)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{table}: cannot be read (it names posix.mkdir" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    assert not out.exists()


def pushed(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def test_a_way_round_the_allowed_names_is_refused(tmp_path: Path) -> None:
    """`CLASS.__init__.__builtins__.get("exec")(CODE)`, in the letters of pickle."""
    lookup = pushed("torch.distributed.checkpoint.filesystem") + pushed("_StorageInfo.__init__.__builtins__.get")
    called = b"\x93" + pushed("exec") + b"\x85R" + pushed(f"open({str(tmp_path / 'executed')!r}, 'w')") + b"\x85R."
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + lookup + called)
    with pytest.raises(ValueError, match="which is no part of a checkpoint"):
        read_metadata(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run with two checkpoints, and the masters of the first."""
    saver = Run(tmp_path_factory.mktemp("runs") / "two")
    saver.train(2)
    saver.save(2)
    masters = saver.masters()
    saver.train(2)
    saver.save(4)
    return saver.checkpoints.run_dir, masters


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "train_state.json"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_torn_file_is_named_and_the_checkpoint_before_still_loads(
    two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, name: str, kept: float
) -> None:
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    newest = whole_checkpoints(tmp_path)[-1]
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: int(len(content) * kept)])
    resumed = Run(tmp_path)
    found = resumed.checkpoints.find("auto")
    assert found == newest
    with pytest.raises(ValueError, match=r"step_00000004.*") as refusal:
        resumed.load(newest)
    assert "\n" not in str(refusal.value)
    resumed.load(newest.with_name("step_00000002"))
    assert equal(resumed.masters(), two_saved[1])


@pytest.mark.parametrize("deleted", [".metadata", "train_state.json"])
def test_without_what_makes_it_whole_it_is_no_checkpoint(
    two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, deleted: str
) -> None:
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step_00000004" / deleted).unlink()
    assert names(tmp_path) == ["step_00000002"]
    assert resolve(str(tmp_path)).name == "step_00000002"
    with pytest.raises(ValueError, match=r"step_00000004: no checkpoint; the newest of its run is .*step_00000002"):
        resolve(str(tmp_path / "checkpoints" / "step_00000004"))
    Run(tmp_path).save(4)  # in its place
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_a_deleted_file_of_tensors_is_named(tmp_path: Path) -> None:
    saver = Run(tmp_path)
    saver.save(1)
    path = whole_checkpoints(tmp_path)[-1]
    (path / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"step_00000001: is damaged .*__0_0\.distcp"):
        saver.load(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', "format"])
def test_a_state_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    saver = Run(tmp_path)
    saver.save(1)
    path = whole_checkpoints(tmp_path)[-1]
    state = json.loads((path / "train_state.json").read_text())
    newer = json.dumps(state | {"format": state["format"] + 1})
    (path / "train_state.json").write_text(newer if content == "format" else content)
    with pytest.raises(ValueError, match=r"train_state\.json: is no state of a checkpoint of format 1"):
        saver.load(path)


def test_half_written_and_foreign_directories_are_no_checkpoints(run: tuple[Path, Path]) -> None:
    data, run_dir = run
    folder = run_dir / "checkpoints"
    expected = names(run_dir)
    shutil.copytree(folder / "step_00000008", folder / ".tmp-step_00000012")
    for foreign in ("step_latest", "step_00000099.superseded", "step_99", "latest"):
        shutil.copytree(folder / "step_00000004", folder / foreign)
    (folder / "step_00000016").mkdir()
    (folder / "step_00000020").write_text("a file\n")
    (folder / "notes").write_text("mine\n")
    assert names(run_dir) == expected
    assert resolve(str(run_dir)).name == expected[-1]
    assert resolve(str(folder / "latest")) == folder / "latest"  # but a path names any
    assert main(command(data, run_dir, *ALONE, "train.duration=12")) == 0
    assert not list(folder.glob(".tmp-*"))
    assert (folder / "notes").read_text() == "mine\n"
    assert (folder / "step_latest" / "__0_0.distcp").exists()


def test_what_names_no_checkpoint_is_told_the_nearest(tmp_path: Path) -> None:
    Run(tmp_path / "run").save(1)
    newest = whole_checkpoints(tmp_path / "run")[-1]
    for named in ("run/checkpoints", "run/checkpoints/step_00000002"):
        with pytest.raises(ValueError, match=f"{named}: no checkpoint; the newest of its run is {newest}$"):
            resolve(str(tmp_path / named))
    for named in ("none", "run/checkpoints/" + 300 * "x", ""):
        with pytest.raises(ValueError, match="no checkpoint; "):
            resolve(str(tmp_path / named))


@contextmanager
def file_size_limit(path: Path) -> Iterator[None]:
    """No file may grow beyond 9 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def filled_up(path: Path) -> Iterator[None]:
    ballast = path / "ballast"
    free = os.statvfs(path)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
    yield
    ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def failed_save_is_told_and_harms_nothing(
    run_dir: Path, no_room: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Run(run_dir, keep_last=1)
    saver.train(1)
    saver.save(1)
    first = whole_checkpoints(run_dir)[0]
    before = files(first)
    with no_room(run_dir), caplog.at_level(logging.WARNING, "lte_scale"):
        saver.save(2, wait=False)
        saver.train(1)
        while "checkpoint step_00000002 could not be written" not in caplog.text:
            saver.train(1)  # until told
            saver.checkpoints.poll()
        assert why in caplog.text and "earlier checkpoints are untouched" in caplog.text
        assert names(run_dir) == ["step_00000001"] and files(first) == before
        assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    saver.save(3)
    assert names(run_dir) == ["step_00000003"]
    again = Run(run_dir)
    again.load(whole_checkpoints(run_dir)[0])
    assert equal(again.masters(), saver.masters())


def test_files_that_cannot_grow_while_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed_save_is_told_and_harms_nothing(tmp_path, file_size_limit, "File too large", caplog)


def test_a_disk_that_fills_up_while_saving(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed_save_is_told_and_harms_nothing(small_disk, filled_up, "No space left on device", caplog)


def test_directories_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"run_dir: cannot write .*file/run \(Not a directory\)"):
        check_writable(tmp_path / "file" / "run")
    check_writable(small_disk / "run")
    assert not list((small_disk / "run" / "checkpoints").iterdir())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for run_dir in (small_disk / "run", small_disk / "other"):
        with pytest.raises(ValueError, match=r"run_dir: cannot write .* \(Read-only file system\); choose"):
            check_writable(run_dir)


def test_a_run_begun_anew_keeps_its_checkpoints_and_resumes_from_them(tmp_path: Path) -> None:
    """Those of the course before are of later steps: they must neither count as the last ones nor be resumed from."""
    before = Run(tmp_path, keep_last=2)
    for step in (50, 60):
        before.save(step)
    kept = files(tmp_path / "checkpoints" / "step_00000060")
    anew = Run(tmp_path, keep_last=2)
    assert anew.checkpoints.find("never") is None
    for step in (10, 20, 30):
        anew.save(step)
        assert anew.checkpoints.find("auto") == tmp_path / "checkpoints" / f"step_{step:08d}"
    assert names(tmp_path) == ["step_00000020", "step_00000030"]
    assert files(tmp_path / "checkpoints" / "step_00000060.superseded") == kept


def test_a_run_that_goes_back_keeps_what_it_was_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Run(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        first.train(1)
        first.save(step, top1=step / 100)
    second = Run(tmp_path, keep_last=2)
    back = second.checkpoints.find(str(tmp_path / "checkpoints" / "step_00000010"))
    assert back is not None
    second.load(back)
    wanted = second.masters()
    with caplog.at_level(logging.WARNING, "lte_scale"):
        second.save(20)
    assert "step_00000030 is of a course that this run has left: it is now step_00000030.superseded" in caplog.text
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    third = Run(tmp_path)
    third.load(resolve(str(tmp_path)))
    assert equal(third.masters(), wanted)
    assert not equal(third.masters(), first.masters())
    assert resolve(str(tmp_path / "checkpoints" / "step_00000030.superseded"))


def test_retention_keeps_the_best_beside_a_damaged_one(tmp_path: Path) -> None:
    saver = Run(tmp_path, keep_last=2)
    saver.save(1, top1=0.9)
    saver.save(2, top1=0.1)
    (tmp_path / "checkpoints" / "step_00000002" / "train_state.json").write_text("")
    saver.save(3, top1=0.2)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    saver.save(4, top1=0.3)
    assert names(tmp_path) == ["step_00000001", "step_00000003", "step_00000004"]


def test_one_that_cannot_be_deleted_does_not_fail_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Run(tmp_path, keep_last=1)
    saver.save(1)
    (tmp_path / "checkpoints" / ".tmp-step_00000001" / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "lte_scale"):
        saver.save(2)
    assert "step_00000001 is one too many and could not be deleted" in caplog.text
    assert "could not be written" not in caplog.text
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


MODES = {mode: replace(PLAIN, adapters=replace(PLAIN.adapters, mode=mode)) for mode in ("reset", "resetless")}
NARROW = replace(PLAIN, model=replace(MODEL, arguments={**MODEL.arguments, "embed_dim": 16}))
UNBIASED = replace(PLAIN, model=replace(MODEL, arguments={**MODEL.arguments, "qkv_bias": False}))


@pytest.mark.parametrize(
    ("saved", "config", "classes", "said"),
    [
        (PLAIN, PLAIN, CLASSES + 1, "another model or rank: head/0/head.B has 21 values there and 24 here"),
        (PLAIN, NARROW, CLASSES, "another model or rank: "),
        (PLAIN, UNBIASED, CLASSES, "replica_master/blocks.0.attn.qkv.bias has 36 values there and none here"),
        (UNBIASED, PLAIN, CLASSES, "blocks.0.attn.qkv.bias has no values there and 36 here"),
        (MODES["resetless"], MODES["reset"], CLASSES, "trained with adapters.mode=resetless, not reset; set it back"),
        (MODES["reset"], MODES["resetless"], CLASSES, "trained with adapters.mode=reset, not resetless"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, saved: Config, config: Config, classes: int, said: str
) -> None:
    Run(tmp_path, saved).save(1)
    other = Run(tmp_path, config, classes)
    before = other.masters()
    with pytest.raises(ValueError, match=re.escape(said)):
        other.load(whole_checkpoints(tmp_path)[-1])
    assert equal(other.masters(), before)


def test_a_moving_average_that_begins_on_resuming_begins_at_the_weights(tmp_path: Path) -> None:
    saver = Run(tmp_path)
    saver.train(4)
    saver.save(4)
    resumed = Run(tmp_path, replace(PLAIN, train=replace(PLAIN.train, ema_decay=0.9)))
    resumed.load(whole_checkpoints(tmp_path)[-1])
    merger = resumed.lte.merger
    assert equal({**merger.outer.averages, **merger.replicas.outer.averages}, saver.masters())


@pytest.mark.parametrize("path", ["factor", "dense"])
@pytest.mark.parametrize("heads", [2, 3])
def test_heads_that_have_learned_nothing_since_change_nothing(tmp_path: Path, path: str, heads: int) -> None:
    """Resetless heads in two levels, as many as before or drawn anew: what others had merged is not taken back."""
    merge = MergeConfig(every=4, local_every=2, path=path)
    config = replace(MODES["resetless"], merge=merge)
    saver = Run(tmp_path, config)
    saver.train(4)
    saver.save(4)
    resumed = Run(tmp_path, replace(config, topology=TopologyConfig(heads_per_node=heads)))
    resumed.load(whole_checkpoints(tmp_path)[-1])
    assert equal(resumed.masters(), saver.masters())
    resumed.lte.merger.merge(8)
    for name, value in resumed.masters().items():
        torch.testing.assert_close(value, saver.masters()[name], rtol=0, atol=1e-6, msg=name)


def save_where_the_rank_thinks(rank: int, config: Config, directory: str) -> list[str]:
    collectives = Collectives(from_environment(config.topology.heads_per_node), timeout_seconds=60)
    lte = assemble(config, CLASSES, collectives, torch.device("cpu"))
    run_dir = Path(directory) / str(rank)
    checkpoints = Checkpoints(run_dir, CheckpointConfig(), collectives)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lte_scale").addHandler(handler)
    pieces = Pieces(lte.heads, lte.merger, lte.optimizer, dict.fromkeys(lte.heads.ids, 0))
    checkpoints.save(pieces, {"step": 1}, "", top1=None, wait=True)
    checkpoints.close()
    logging.getLogger("lte_scale").removeHandler(handler)
    return told


def test_nodes_that_do_not_share_the_directory_are_told(tmp_path: Path) -> None:
    config = replace(PLAIN, engine=EngineConfig(name="fsdp"), topology=TopologyConfig(heads_per_node=1))
    pool = DistributedPool(2)
    told, _ = pool.run(save_where_the_rank_thinks, config, str(tmp_path), ranks_per_node=1)
    pool.close()
    assert len(told) == 1
    assert "__1_0.distcp of another rank is not there: all nodes must share the file system of run_dir" in told[0]
    assert names(tmp_path / "0") == [] and names(tmp_path / "1") == []
