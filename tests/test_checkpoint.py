"""Checkpoints that are torn, foreign or hostile: one line that names the file, nothing executed, nothing lost."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from lte_scale.checkpoint import whole_checkpoints
from lte_scale.cli import main
from tests.test_train import SMALL, command

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
    table = whole_checkpoints(run_dir)[-1] / ".metadata"
    table.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for words in (command(data, run_dir, *ALONE, "train.duration=12"), ["export", str(run_dir), str(tmp_path / "out")]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{table}: cannot be read (it names posix.mkdir" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_torn_file_is_named_and_the_checkpoint_before_still_loads(
    run: tuple[Path, Path], name: str, kept: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = run
    newest = whole_checkpoints(run_dir)[-1]
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: int(len(content) * kept)])
    assert main(command(data, run_dir, *ALONE, "train.duration=12")) == 2
    error = capsys.readouterr().err
    assert str(newest) in error
    assert "Traceback" not in error
    shutil.rmtree(newest)
    assert main(command(data, run_dir, *ALONE, "train.duration=12")) == 0
    assert whole_checkpoints(run_dir)[-1].name == "step_00000012"


def test_half_written_and_foreign_directories_are_no_checkpoints(run: tuple[Path, Path]) -> None:
    data, run_dir = run
    folder = run_dir / "checkpoints"
    expected = [path.name for path in whole_checkpoints(run_dir)]
    shutil.copytree(folder / "step_00000008", folder / ".tmp-step_00000012")
    (folder / "step_00000016").mkdir()
    (folder / "step_latest").mkdir()
    (folder / "notes").write_text("mine\n")
    assert [path.name for path in whole_checkpoints(run_dir)] == expected
    assert main(command(data, run_dir, *ALONE, "train.duration=12")) == 0
    assert not list(folder.glob(".tmp-*"))
    assert (folder / "notes").read_text() == "mine\n"


def test_a_full_disk_leaves_training_and_the_earlier_checkpoint(run: tuple[Path, Path], tmp_path: Path) -> None:
    """No file may grow beyond 20 kB, as on a disk that is full."""
    data, run_dir = run
    full = run_dir / "checkpoints" / ".tmp-step_00000012"
    before = [path.name for path in whole_checkpoints(run_dir)]
    limit = tmp_path / "limit.py"
    limit.write_text(
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from lte_scale.cli import main\n"
        "import torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = command(data, run_dir, *ALONE, "train.duration=12")
    done = subprocess.run([sys.executable, str(limit), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint step_00000012 could not be written" in done.stdout + done.stderr
    assert "File too large" in done.stdout + done.stderr
    assert [path.name for path in whole_checkpoints(run_dir)] == before
    assert not full.exists()


def test_export_refuses_what_it_cannot_do_and_leaves_nothing(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run_dir = trained
    (tmp_path / "there").write_text("kept")
    for words, message in (
        ([str(run_dir), str(tmp_path / "there")], "exists; choose another file"),
        ([str(run_dir), str(tmp_path / "no" / "model.safetensors")], "there is no directory"),
        ([str(tmp_path), str(tmp_path / "model.safetensors")], "no checkpoint"),
        (["--ema", str(run_dir), str(tmp_path / "model.safetensors")], "holds no moving average"),
    ):
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_a_run_and_its_checkpoint_export_the_same_model(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, run_dir = trained
    for source, out in ((run_dir, "a.safetensors"), (whole_checkpoints(run_dir)[-1], "b.safetensors")):
        assert main(["export", str(source), str(tmp_path / out)]) == 0
    first, second = (safetensors.torch.load_file(tmp_path / out) for out in ("a.safetensors", "b.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "a.safetensors"), img_size=8, in_chans=1,
        num_classes=10, patch_size=4, embed_dim=32, depth=2, num_heads=2,
    )  # fmt: skip
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
