"""Records in TensorBoard's and W&B's files, read back; what is said where a package is missing or fails."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lte_scale.config.schema import MetricsConfig
from lte_scale.metrics.record import Record
from lte_scale.metrics.writers import WandbWriter, build_writers, check_installed, scalars

ROOT = Path(__file__).parent.parent
SETTINGS = {"seed": 0, "model": {"name": "vit_tiny_patch16_224"}}
RECORD = Record(
    step=10, epoch=0.5, images=640, loss=2.5, top1=0.25, lr=1e-3, grad_norm=0.75, images_per_second=1000.0,
    step_seconds=0.064, data_wait_seconds=0.1, merge_seconds=0.2, inter_node_bytes=3_000_000_000, intra_node_bytes=70,
    mfu=None, heads=2, skipped_steps=0, bad_samples=0, bad_shards=0, restarts=0, time=1_700_000_000.0,
    phase_seconds={"forward": 0.25, "merge": 0.5}, sent_bytes={"inter_node/merge_factor": 3_000_000_000},
    full_rank_bytes=9_000_000_000, memory_peak_bytes=1_000_000, head_loss=[2.0, 3.0], head_grad_norm=[0.5, 1.0],
)  # fmt: skip


def at(step: int, **values: Any) -> Record:
    return replace(RECORD, step=step, time=RECORD.time + step, **values)


def test_nested_figures_have_names_of_their_own() -> None:
    names = dict(scalars(at(10, eval_top1=0.5)))
    assert names["phase_seconds/forward"] == 0.25
    assert names["sent_bytes/inter_node/merge_factor"] == 3_000_000_000
    assert (names["head_loss/0"], names["head_loss/1"]) == (2.0, 3.0)
    assert names["eval_top1"] == 0.5
    assert not {"step", "time", "mfu", "eval_loss", "head_delta_norm", "phase_seconds"} & names.keys()
    assert all(isinstance(value, int | float) for value in names.values())


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    assert build_writers(MetricsConfig(), tmp_path, "run", SETTINGS) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_is_refused_in_one_line(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tensorboard": MetricsConfig(tensorboard=True), "wandb": MetricsConfig(wandb="project")}[package]
    find_spec = importlib.util.find_spec
    said = f"metrics.{package}: needs the package {package}; install it with pip install 'lte-scale[{package}]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        check_installed(config)
    assert str(refusal.value) == said
    with pytest.raises(ValueError, match="needs the package"):
        build_writers(config, tmp_path, "run", SETTINGS)


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(ValueError, match=r"^metrics.wandb: needs the package wandb"):
        check_installed(MetricsConfig(wandb="project"))


def test_broken_package_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^metrics.wandb: the package wandb does not load \(.*\); install it anew"):
        WandbWriter("project", tmp_path, "run", SETTINGS)


def event_files(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    module: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    return module.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (writer,) = build_writers(MetricsConfig(tensorboard=True), tmp_path, "run", SETTINGS)
    writer.write(at(10))
    writer.write(at(20, loss=math.nan, mfu=0.5))
    writer.close()
    events = event_files(tmp_path / "tensorboard")
    assert set(events.Tags()["scalars"]) == {name for name, _ in scalars(at(20, mfu=0.5))}
    first, second = events.Scalars("loss")
    assert (first.step, first.wall_time, first.value) == (10, RECORD.time + 10, 2.5)
    assert second.step == 20 and math.isnan(second.value)
    assert [event.value for event in events.Scalars("phase_seconds/merge")] == [0.5, 0.5]
    assert [event.step for event in events.Scalars("mfu")] == [20]
    (text,) = events.Tensors("settings/text_summary")
    assert b"vit_tiny_patch16_224" in text.tensor_proto.string_val[0]


def test_tensorboard_forgets_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for resumed, steps, loss in ((0, (10, 20, 30), 1.0), (20, (30, 40), 2.0)):
        (writer,) = build_writers(MetricsConfig(tensorboard=True), tmp_path, "run", SETTINGS)
        writer.rewind(resumed)
        for step in steps:
            writer.write(at(step, loss=loss))
        writer.close()
    losses = [(event.step, event.value) for event in event_files(tmp_path / "tensorboard").Scalars("loss")]
    assert losses == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_writer_that_fails_warns_once_and_training_goes_on(
    tmp_path: Path, package: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    config = {"tensorboard": MetricsConfig(tensorboard=True), "wandb": MetricsConfig(wandb="project")}[package]
    (tmp_path / package).write_text("a file where its folder should be")
    (writer,) = build_writers(config, tmp_path, "run", SETTINGS)
    with caplog.at_level(logging.WARNING, "lte_scale"):
        writer.write(at(10))
        writer.write(at(20))
        writer.rewind(10)
        writer.close()
    (warning,) = caplog.messages
    assert warning.startswith(f"metrics.{package}: FileExistsError: ")
    assert warning.endswith("; nothing is written there from here on")
    assert "Traceback" not in capfd.readouterr().err


def wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a run file: a log of LevelDB after seven bytes."""
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = protocol.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(path):
        if record.HasField("history"):
            items = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()} | {"step": record.history.step.num})
    return rows


SCRIPT = """
import sys, time
from pathlib import Path
from lte_scale.config.schema import MetricsConfig
from lte_scale.metrics.writers import build_writers
from tests.test_writers import SETTINGS, at

run_dir = Path(sys.argv[1])
for resumed, steps in ((0, (10, 20, 30)), (20, (30, 40))):
    (writer,) = build_writers(MetricsConfig(wandb="project"), run_dir, "run", SETTINGS)
    writer.rewind(resumed)
    for step in steps:
        writer.write(at(step, loss=float(step)))
    writer.close()
print(time.time())
"""


def test_wandb_writes_offline_quietly_and_asks_nobody(tmp_path: Path) -> None:
    """Its server's address is a port of this test, where nobody calls."""
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        seconds_to_exit = time.time() - float(done.stdout or "nan")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds_to_exit < 10
    runs = {}
    for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"):
        (head,) = (record.run for record in wandb_records(path) if record.HasField("run"))
        assert (head.project, head.run_group) == ("project", "run")
        config = {item.key: json.loads(item.value_json) for item in head.config.update}
        assert config["model"] == {"name": "vit_tiny_patch16_224"}
        runs[head.display_name] = history(path)
    assert [(row["step"], row["loss"]) for row in runs["run"]] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert [(row["step"], row["loss"]) for row in runs["run from step 20"]] == [(30, 30.0), (40, 40.0)]
    assert runs["run"][0]["phase_seconds/forward"] == 0.25
    assert len(runs) == 2
