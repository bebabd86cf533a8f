"""Saving where there is no room, and which checkpoints are kept: told, and nothing lost."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lte_scale import trainer
from lte_scale.cli import main
from lte_scale.run_dir import check_writable, resolve, whole_checkpoints
from tests.saver import Run, equal, file_size_limit, files, names

ROOT = Path(__file__).parent.parent


@contextmanager
def filled_up(path: Path) -> Iterator[None]:
    ballast = path / "ballast"
    free = os.statvfs(path)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
    yield
    ballast.unlink()


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """As a file system becomes that has lost its disk or its server."""
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # a run of this process keeps its log open


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


def test_a_mount_that_is_lost_while_saving(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed_save_is_told_and_harms_nothing(small_disk, read_only, "Read-only file system", caplog)


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


@pytest.fixture
def short(small_disk: Path, tmp_path: Path) -> list[str]:
    """The command of a run of one merge, all of its run directory on the small disk."""
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    words = ["train", str(ROOT / "configs" / "demo.yaml"), f"data.train={tmp_path / 'data' / 'train'}", "data.val="]
    return [*words, f"run_dir={small_disk / 'run'}", "train.duration=20", "metrics={port: 0}"]


def test_a_last_save_without_room_ends_in_an_error(
    short: list[str], small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "_LAST_SAVE_PAUSES_SECONDS", (0.1, 0.1))
    with filled_up(small_disk):
        assert main(short) == trainer.NOT_SAVED
    assert caplog.text.count("could not be written") >= 3
    assert "what was trained since the checkpoint before is not saved" in caplog.text
    assert names(small_disk / "run") == []
    assert main(short) == 0
    assert names(small_disk / "run") == ["step_00000020"]


def test_a_last_save_waits_for_room(
    short: list[str], small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "_LAST_SAVE_PAUSES_SECONDS", (0.1, 5.0))
    with filled_up(small_disk):
        cleared = threading.Event()

        def clear() -> None:
            while not cleared.wait(0.02):
                if caplog.text.count("could not be written") >= 2:
                    (small_disk / "ballast").write_bytes(b"")
                    return

        clearing = threading.Thread(target=clear)
        clearing.start()
        code = main(short)
        cleared.set()
        clearing.join()
    assert code == 0
    assert names(small_disk / "run") == ["step_00000020"]
