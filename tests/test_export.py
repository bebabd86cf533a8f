"""What leaves a run: the merged weights in plain timm, equal to the model that was trained; and its accuracy."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor

from lte_scale.augment import ToBatch, eval_transform
from lte_scale.cli import main
from lte_scale.config import dump
from lte_scale.config.schema import Config, DataConfig
from tests.reference import CLASSES
from tests.saver import MODEL, PLAIN, Run, file_size_limit, relist
from tests.shard_files import CLASSES as SHARD_CLASSES
from tests.shard_files import png, sample_files, write_lengths, write_tar

CONFIG = replace(PLAIN, train=replace(PLAIN.train, ema_decay=0.5), data=DataConfig(workers=0))
ARGUMENTS: dict[str, Any] = {"img_size": 28, "in_chans": 1, "num_classes": CLASSES, **MODEL.arguments}
IMAGES = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def logits(run: Run, *, average: bool) -> Tensor:
    """Of the model that was trained, without heads."""
    with torch.no_grad(), run.lte.merger.merged(average=average):
        return run.lte.model.eval()(IMAGES)


def saved(run: Run, config: Config, step: int, top1: float | None = None) -> Path:
    state = {"step": step, "classes": CLASSES}
    run.checkpoints.save(run.pieces, state, dump(config), top1=top1, wait=True)
    return run.checkpoints.run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A run with checkpoints at steps 2, of the best accuracy, and 4; the logits of both."""
    run = Run(tmp_path_factory.mktemp("runs") / "run", CONFIG)
    outputs = []
    for top1 in (0.6, 0.5):
        run.train(2)
        outputs.append(logits(run, average=False))
        saved(run, CONFIG, run.step, top1)
    return run.checkpoints.run_dir, outputs


@pytest.fixture
def run_dir(trained: tuple[Path, list[Tensor]], tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def in_timm(file: Path, images: Tensor = IMAGES) -> Tensor:
    model = timm.create_model(MODEL.name, checkpoint_path=str(file), **ARGUMENTS)
    with torch.no_grad():
        return model.eval()(images)


CASES = {
    "reset": CONFIG,
    "resetless": replace(CONFIG, adapters=replace(CONFIG.adapters, mode="resetless")),
    "dense head": replace(CONFIG, adapters=replace(CONFIG.adapters, dense=["head", "blocks.0.attn.*"])),
}


@pytest.mark.parametrize("case", CASES)
def test_timm_computes_what_the_trained_model_computes(tmp_path: Path, case: str) -> None:
    run = Run(tmp_path, CASES[case])
    run.train(3)  # in the middle of a window: what the heads have learned since the merge is not exported
    saved(run, CASES[case], 3)
    for option, average in (([], False), (["--ema"], True)):
        out = tmp_path / f"{average}.safetensors"
        assert main(["export", str(tmp_path), str(out), *option]) == 0
        torch.testing.assert_close(in_timm(out), logits(run, average=average), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(run, average=False), logits(run, average=True), rtol=1e-3)


def test_a_run_means_its_newest_checkpoint_and_best_its_best(
    trained: tuple[Path, list[Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, outputs = trained
    first, last = (run_dir / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    sources = [([str(run_dir)], 1), ([str(last)], 1), ([str(first)], 0), ([str(run_dir), "--best"], 0)]
    for number, (words, which) in enumerate(sources):
        out = tmp_path / f"{number}.safetensors"
        assert main(["export", words[0], str(out), *words[1:]]) == 0
        torch.testing.assert_close(in_timm(out), outputs[which], rtol=1e-5, atol=1e-6)
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": MODEL.name, "checkpoint": "step_00000002"}
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)
    said = capsys.readouterr().out.splitlines()[-1]  # the line to paste
    model = eval(said, {"timm": timm})
    assert model.state_dict().keys() == safetensors.torch.load_file(out).keys()


def test_refused_with_one_line_and_nothing_left(
    trained: tuple[Path, list[Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = trained
    (tmp_path / "there.safetensors").write_text("kept")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    good = str(tmp_path / "model.safetensors")
    for words, message in (
        ([str(run_dir), str(tmp_path / "there.safetensors")], "there.safetensors: exists; choose another file"),
        ([str(run_dir), str(tmp_path / "link.safetensors")], "link.safetensors: exists; choose another file"),
        ([str(run_dir), str(tmp_path / "model")], f"write {good}"),
        ([str(run_dir), str(tmp_path / "model.bin")], "timm knows safetensors by the extension"),
        ([str(run_dir), str(tmp_path / "no" / "model.safetensors")], "there is no directory"),
        ([str(run_dir), "/proc/model.safetensors"], "/proc/model.safetensors: cannot be written ("),
        ([str(run_dir), str(tmp_path / f"{300 * 'x'}.safetensors")], "cannot be written ("),
        ([str(tmp_path), good], f"{tmp_path}: no checkpoint; name a run directory or one of its checkpoints"),
        ([str(tmp_path / "none"), good, "--best"], "none: no checkpoint; name a run directory"),
        ([str(run_dir / "checkpoints" / "step_00000004"), good, "--best"], "leave out --best"),
        ([str(run_dir / "checkpoints"), good], "the newest of its run is"),
    ):
        assert main(["export", *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.safetensors", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "kept"


def test_a_full_disk_leaves_no_file(
    trained: tuple[Path, list[Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_size_limit(tmp_path):
        assert main(["export", str(trained[0]), str(tmp_path / "model.safetensors")]) == 2
    assert "model.safetensors: cannot be written (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def rewritten(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    relist(file.parent)


def test_a_damaged_checkpoint_is_not_exported(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "checkpoints" / "step_00000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["export", str(run_dir), str(run_dir / "model.safetensors")]) == 2
    assert "step_00000004: is damaged: __0_0.distcp is not as it was written" in capsys.readouterr().err
    assert not (run_dir / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "config.yaml",
            "embed_dim: 12",
            "embed_dim: 24",
            r"step_00000004: master/\S+ is not that of the model in its con",
        ),
        ("config.yaml", "depth: 1", "depth: 2", r"step_00000004: master/blocks\.1\.attn\.qkv is not that of the model"),
        ("config.yaml", "model:", "modle:", r"modle: unknown key"),
        ("train_state.json", '"classes": 7', '"classes": 5', r"master/head is not that of the model"),
        ("train_state.json", '"classes": 7,', "", r"train_state\.json names no number of classes"),
        ("train_state.json", "{", "", r"train_state\.json: cannot be read"),
    ],
)
def test_a_checkpoint_that_was_changed_by_hand(
    run_dir: Path, file: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(run_dir / "checkpoints" / "step_00000004" / file, old, new)
    assert main(["export", str(run_dir), str(run_dir / "model.safetensors")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (run_dir / "model.safetensors").exists()


@pytest.mark.parametrize("file", ["config.yaml", "__0_0.distcp"])
def test_a_deleted_file_is_named(run_dir: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step_00000004" / file).unlink()
    assert main(["export", str(run_dir), str(run_dir / "model.safetensors")]) == 2
    error = capsys.readouterr().err
    assert file in error and "step_00000004" in error
    assert not (run_dir / "model.safetensors").exists()


def test_eval_is_the_accuracy_of_the_exported_model(
    trained: tuple[Path, list[Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On whole samples, in batches of any size; one that is damaged is named and left out."""
    run_dir, samples, bad = trained[0], range(11), 3
    files = {name: content for identity in samples for name, content in sample_files(identity).items()}
    write_tar(tmp_path / "val" / "00000.tar", files | {f"{bad:06d}.png": b"no image"})
    said = set()
    for size in ("1", "4", "256"):
        with caplog.at_level(logging.WARNING, "lte_scale"):
            assert main(["eval", str(run_dir), "--data", str(tmp_path / "val"), "--batch-size", size]) == 0
        assert "left out damaged" in caplog.text and f"{bad:06d}" in caplog.text
        caplog.clear()
        said.add(capsys.readouterr().out)
    assert main(["export", str(run_dir), str(tmp_path / "model.safetensors")]) == 0
    transform, to_batch = eval_transform(28), ToBatch(CONFIG.augment, 1)
    whole = [identity for identity in samples if identity != bad]
    images = to_batch([transform(Image.open(io.BytesIO(png(identity)))) for identity in whole])
    labels = torch.tensor([identity % SHARD_CLASSES for identity in whole])
    scores = in_timm(tmp_path / "model.safetensors", images)
    top1 = (scores.argmax(1) == labels).double().mean()
    top5 = (scores.topk(5).indices == labels.unsqueeze(1)).any(1).double().mean()
    loss = torch.nn.functional.cross_entropy(scores, labels)
    name = run_dir / "checkpoints" / "step_00000004"
    assert said == {f"{name}: top-1 {top1:.2%}  top-5 {top5:.2%}  loss {loss:.4f}\n"}


def test_eval_refuses_with_one_line(
    trained: tuple[Path, list[Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = trained
    write_lengths(tmp_path / "val", [5])
    val = str(tmp_path / "val")
    listing = {"format": 1, "classes": [str(c) for c in range(10)], "shards": [{"name": "00000.tar", "samples": 5}]}
    write_lengths(tmp_path / "ten", [5])
    (tmp_path / "ten" / "index.json").write_text(json.dumps(listing))
    for words, message in (
        ([], "its configuration names no data.val; give validation shards with --data"),
        (["--data", str(tmp_path / "none")], "none: no such directory or shard"),
        (["--data", str(tmp_path / "ten")], "ten: has 10 classes, the model of"),
        (["--data", val, "--batch-size", "0"], "--batch-size: is 0; allowed: at least 1"),
        (["--data", val, "--device", "abacus"], "--device: abacus cannot be used ("),
        (["--data", val, "--device", "cuda:99"], "--device: cuda:99 cannot be used ("),
    ):
        assert main(["eval", str(run_dir), *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
