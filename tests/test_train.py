"""Whole runs from the command line: interrupted at any moment they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lte_scale.cli import main
from lte_scale.run_dir import whole_checkpoints

ROOT = Path(__file__).parent.parent
EMULATE = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", "2", "--ranks-per-node", "2", "--"]
SMALL = [
    "model={name: vit_tiny_patch16_224, image_size: 8, channels: 1, drop_path: 0.1}",
    "model.arguments={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "adapters={rank: 4, alpha: 16}",
    "train.batch_size=8",
    "augment={pad_crop: 1, mixup: 0.2, rand_augment: rand-m5-n1}",
    "checkpoint.every=5",
    "evaluate.every=8",
    "metrics.every=1",
]
INTERRUPTED = [*SMALL, "merge={every: 8, local_every: 4}", "train.duration=40", "train.accumulate=2", "data.workers=1"]


def command(digits: Path, run_dir: Path, *overrides: str) -> list[str]:
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", f"run_dir={run_dir}"]
    return ["train", str(ROOT / "configs" / "demo.yaml"), *overrides, *data, "metrics.port=0"]


def records(run_dir: Path) -> list[dict[str, float]]:
    """Those that are wholly written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*EMULATE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(job: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = job.communicate(timeout=300)
    assert job.returncode == code, output
    return output


def wait_for_step(job: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    until = time.monotonic() + 240
    while not any(r["step"] >= step for r in records(run_dir)):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp_load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(command(digits, run_dir, *INTERRUPTED)))
    return run_dir


def assert_same_end(run_dir: Path, other: Path, *, leaving_out: str = "") -> None:
    ours, theirs = tensors(whole_checkpoints(run_dir)[-1]), tensors(whole_checkpoints(other)[-1])
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for mine, his in zip(records(run_dir), records(other), strict=True):
        for key in ("step", "images", "loss", "grad_norm", "lr", "eval_top1", "inter_node_bytes", "intra_node_bytes"):
            assert key == leaving_out or mine.get(key) == his.get(key), (mine["step"], key)


def test_killed_in_the_middle_of_everything_then_terminated(digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 of all ranks in the middle of a window, an epoch and an accumulation; SIGTERM ends all nodes, saved."""
    run_dir = tmp_path / "interrupted"
    job = start(command(digits, run_dir, *INTERRUPTED))
    wait_for_step(job, run_dir, 13)
    kill_all(job)
    job = start(command(digits, run_dir, *INTERRUPTED))
    wait_for_step(job, run_dir, 23)
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    output = finish(job, 128 + signal.SIGTERM)
    assert time.monotonic() - began < 10
    assert "resumed from" in output
    assert "all ranks end after step" in output
    stopped = int(whole_checkpoints(run_dir)[-1].name.removeprefix("step_"))
    assert 23 <= stopped < 40
    output = finish(start(command(digits, run_dir, *INTERRUPTED)))
    assert f"at step {stopped} of 40" in output
    assert_same_end(run_dir, uninterrupted)


@pytest.mark.slow
def test_delayed_merges_killed_and_terminated(digits: Path, tmp_path: Path) -> None:
    """Merges under way are in no checkpoint: it is saved, and the run stopped, when they have landed."""
    merge = "merge={every: 8, local_every: 4, delay: 3, fragments: 2, precision: int8, outer: nesterov, outer_lr: 0.7}"
    words = [*INTERRUPTED, merge, "checkpoint.every=4", "checkpoint.keep_last=20"]
    whole, killed, terminated = tmp_path / "whole", tmp_path / "killed", tmp_path / "terminated"
    finish(start(command(digits, whole, *words)))
    steps = [int(path.name.removeprefix("step_")) for path in whole_checkpoints(whole)]
    assert steps == [7, 11, 15, 19, 23, 27, 31, 35, 39, 40]
    assert [r["step"] for r in records(whole) if "eval_top1" in r] == [11, 19, 27, 35, 40]

    job = start(command(digits, killed, *words))
    wait_for_step(job, killed, 13)
    kill_all(job)
    assert "resumed from" in finish(start(command(digits, killed, *words)))
    assert_same_end(killed, whole)

    job = start(command(digits, terminated, *words))
    wait_for_step(job, terminated, 12)
    job.send_signal(signal.SIGTERM)
    assert "all ranks end after step" in finish(job, 128 + signal.SIGTERM)
    stopped = int(whole_checkpoints(terminated)[-1].name.removeprefix("step_"))
    assert 12 <= stopped < 40
    assert stopped % 4 == 3
    assert f"at step {stopped} of 40" in finish(start(command(digits, terminated, *words)))
    ours, theirs = tensors(whole_checkpoints(terminated)[-1]), tensors(whole_checkpoints(whole)[-1])
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def kill_all(job: subprocess.Popen[str]) -> None:
    """kill -9 of all that an emulation has started."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LTE_EMULATION={job.pid}-".encode() in environ.read_bytes():
                os.kill(int(environ.parent.name), signal.SIGKILL)
        except OSError:
            continue
    job.communicate(timeout=240)
    assert job.returncode != 0


def test_bytes_cross_the_nodes_only_at_global_merges(uninterrupted: Path) -> None:
    sent = 0.0
    for record in records(uninterrupted):
        if record["step"] % 8:
            assert record["inter_node_bytes"] == sent
        else:
            assert record["inter_node_bytes"] > sent
        sent = record["inter_node_bytes"]


def test_one_process_to_a_model_that_timm_loads(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = tmp_path / "one", tmp_path / "model.safetensors"
    words = command(digits, run_dir, *SMALL, "engine=none", "base.gather=pass", "topology.heads_per_node=3",
                    "merge={every: 4, local_every: 4}", "train.duration=8", "train.precision=fp32",
                    "train.ema_decay=0.9", "data.workers=0")  # fmt: skip
    assert main(words) == 0
    assert main(["export", str(run_dir), str(out)]) == 0
    assert main(["export", str(run_dir), str(out)]) == 2
    assert main(["export", str(run_dir), str(tmp_path / "ema.safetensors"), "--ema"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run_dir), "--ema"]) == 0
    said = capsys.readouterr().out
    assert f"top-1 {records(run_dir)[-1]['eval_top1']:.2%}" in said
    shape: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    arguments: dict[str, Any] = {"img_size": 8, "in_chans": 1, "num_classes": 10, **shape}
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(out), **arguments)
    stored = safetensors.torch.load_file(out)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("engine", [pytest.param("none", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize("option", ["train.compile=true", "train.checkpoint_activations=true"])
def test_switches_do_not_change_what_is_learned(digits: Path, tmp_path: Path, option: str, engine: str) -> None:
    losses = []
    for number, extra in enumerate(([], [option])):
        run_dir = tmp_path / str(number)
        words = command(digits, run_dir, *SMALL, f"engine={engine}", "base.gather=pass", "model.drop_path=0",
                        "merge={every: 2, local_every: 2}", "train.duration=4", "train.precision=fp32",
                        "data.workers=0", *extra)  # fmt: skip
        assert main(words) == 0
        losses.append([record["loss"] for record in records(run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_finite_is_skipped_then_stops_the_run(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "nan"
    words = command(digits, run_dir, *SMALL, "engine=none", "base.gather=pass", "merge={every: 4, local_every: 4}",
                    "optimizer.lr=1e30", "train.max_skipped=3", "train.duration=40", "data.workers=0")  # fmt: skip
    assert main(words) == 3
    error = capsys.readouterr().err
    assert "head 0 withdrawn, it skipped 3 steps in a row, once more" in error
    assert "saved at step" in error
    assert whole_checkpoints(run_dir)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=nowhere/train"], ["nowhere/train"]),
        (["model.name=vit_tiny_patch16_244"], ["model.name", "vit_tiny_patch16_224"]),
        (["model.name=resnet18", "model.arguments={}"], ["layer conv1", "adapters.dense"]),
        (["model.num_classes=5"], ["model.num_classes", "5"]),
        (["resume=runs/none/of/these"], ["resume", "no checkpoint"]),
        (["run_dir=/proc/none"], ["run_dir", "/proc/none"]),
        (["adapters.dense=[haed]"], ["haed", "matches no layer", "nearest: head"]),
        (["model.arguments.patch_sise=3"], ["patch_sise"]),
    ],
)
def test_refused_with_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    base = command(digits, tmp_path / "refused", *SMALL, "engine=none", "base.gather=pass", "data.workers=0")
    assert main([*base, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_a_refusal_of_four_ranks_is_one_line(digits: Path, tmp_path: Path) -> None:
    output = finish(start(command(digits, tmp_path / "refused", *SMALL, "topology.heads_per_node=3")), 2)
    assert output.count("lte-scale:") == 1
    assert "3 heads cannot be placed on 2 ranks per node" in output


def test_the_example_loop_learns(tmp_path: Path) -> None:
    copy = tmp_path / "own_loop.py"
    shutil.copy(ROOT / "examples" / "own_loop.py", copy)
    # One thread: more, beside other processes on the same cores, wait for one another.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.check_output([sys.executable, str(copy)], text=True, stderr=subprocess.STDOUT, env=alone)
    accuracy = float(output.split("merged model: ")[1].split("%")[0])
    assert accuracy > 80


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_stopped_at_any_moment(digits: Path, uninterrupted: Path, tmp_path: Path, asynchronous: str) -> None:
    """Where nearly every step meets the other node, for a save."""
    stop_at_any_moment(digits, tmp_path / "stopped", uninterrupted, f"checkpoint.asynchronous={asynchronous}")


@pytest.mark.slow
def test_stopped_at_any_moment_where_regions_merge(digits: Path, tmp_path: Path) -> None:
    overrides = [
        "train.duration=16",
        "merge={every: 8, region_every: 2, local_every: 1}",
        "topology.nodes_per_region=2",
    ]
    finish(start(command(digits, tmp_path / "whole", *INTERRUPTED, *overrides)))
    stop_at_any_moment(digits, tmp_path / "stopped", tmp_path / "whole", *overrides)


def stop_at_any_moment(digits: Path, run_dir: Path, uninterrupted: Path, *overrides: str) -> None:
    """SIGTERM at moments of no choosing, nodes some ms apart; in the end the weights of the uninterrupted run."""
    often = [*INTERRUPTED, "metrics.every=1", "checkpoint.every=1", *overrides]
    delays = random.Random(0)
    for _ in range(4):
        job = start(command(digits, run_dir, *often))
        step = int(whole_checkpoints(run_dir)[-1].name.removeprefix("step_")) if run_dir.exists() else 0
        wait_for_step(job, run_dir, step + 1)
        time.sleep(delays.uniform(0, 0.4))
        began = time.monotonic()
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=240)
        assert job.returncode in (0, 128 + signal.SIGTERM)
        assert time.monotonic() - began < 15
        assert whole_checkpoints(run_dir)[-1].name == f"step_{records(run_dir)[-1]['step']:08d}"
        if job.returncode == 0:
            break
    finish(start(command(digits, run_dir, *often)))
    ours, theirs = tensors(whole_checkpoints(run_dir)[-1]), tensors(whole_checkpoints(uninterrupted)[-1])
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
