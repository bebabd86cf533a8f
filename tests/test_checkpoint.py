"""Checkpoints that are torn, foreign or hostile: one line that names the file, nothing executed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from lte_scale.assemble import assemble
from lte_scale.checkpoint import Checkpoints
from lte_scale.cli import main
from lte_scale.collectives import Collectives
from lte_scale.config.schema import (
    CheckpointConfig,
    Config,
    EngineConfig,
    MergeConfig,
    TopologyConfig,
)
from lte_scale.contents import Pieces
from lte_scale.run_dir import resolve, whole_checkpoints
from lte_scale.storage import read_metadata
from lte_scale.topology import from_environment
from tests.harness import DistributedPool
from tests.reference import CLASSES
from tests.saver import MODEL, PLAIN, Run, equal, names, relist
from tests.test_train import SMALL, command, tensors

ALONE = [*SMALL, "merge={every: 4, local_every: 4}", "data.workers=0", "checkpoint={every: 4, keep_last: 3}"]


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
    relist(table.parent)
    for words in (command(data, run_dir, *ALONE, "train.duration=12"), ["export", str(run_dir), str(out)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{table}: cannot be read (it names posix.mkdir" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    assert not out.exists()


def test_a_run_whose_newest_checkpoint_is_torn_ends_as_if_it_were_not(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on from the one before. All ways to tear one are in test_torn.py."""
    data, run_dir = run
    newest = whole_checkpoints(run_dir)[-1]
    expected = tensors(newest)
    (newest / "train_state.json").unlink()
    assert main(command(data, run_dir, *ALONE, "train.duration=8")) == 0
    said = capsys.readouterr().err
    assert f"warning: {newest} is damaged: train_state.json is missing; looking for the one before\n" in said
    assert f"resumed from {newest.with_name('step_00000004')}" in said
    found = tensors(newest)
    assert [name for name in expected if not found[name].equal(expected[name])] == []


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


class Attribute:
    """Pickled as getattr of a class."""

    def __init__(self, of: type, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[object, tuple[type, str]]:
        return getattr, (self.of, self.name)


@pytest.mark.parametrize(
    ("of", "name", "said"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", "it is no table of tensors"),  # read, and no more than that
        (_MEM_FORMAT_ENCODING, "__init__", "it takes __init__ of <enum"),
        (Metadata, "__init__", "it takes __init__ of <class"),
    ],
)
def test_of_attributes_only_the_members_that_python_3_11_2_pickles_so_are_read(
    tmp_path: Path, of: type, name: str, said: str
) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(of, name)))
    with pytest.raises(ValueError, match=said):
        read_metadata(tmp_path)


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


FILES = [".metadata", "__0_0.distcp", "train_state.json", "config.yaml", "SHA256SUMS"]


def test_sha256sum_reads_the_list(two_saved: tuple[Path, dict[str, Tensor]]) -> None:
    newest = whole_checkpoints(two_saved[0])[-1]
    assert set(os.listdir(newest)) == set(FILES)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=newest, check=True, capture_output=True
    )
    assert checked.stdout.count(b": OK") == len(FILES) - 1


@pytest.mark.parametrize("deleted", [".metadata", "train_state.json", "SHA256SUMS"])
def test_without_what_makes_it_whole_it_is_no_checkpoint(
    two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, deleted: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step_00000004" / deleted).unlink()
    assert names(tmp_path) == ["step_00000002"]
    assert resolve(str(tmp_path)).name == "step_00000002"
    assert "step_00000004 lacks files of a checkpoint; using step_00000002" in caplog.text
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
