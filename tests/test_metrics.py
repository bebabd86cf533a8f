"""metrics.jsonl, the progress line, the table at the end, peaks, and the events of the log."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lte_scale import log as logs
from lte_scale.log import log, setup
from lte_scale.metrics.accelerators import peak_tflops
from lte_scale.metrics.record import JsonlWriter, format_progress, format_summary
from tests.records import RECORD


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clean_log() -> Iterator[None]:
    level = log.level
    yield
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


# metrics.jsonl


def test_a_record_is_one_line_of_plain_json(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(replace(RECORD, loss=math.nan, grad_norm=math.inf, head_loss=[1.0, math.nan]))
    writer.write(replace(RECORD, step=1210, eval_top1=0.9, eval_top5=0.99, eval_loss=0.4))
    plain, evaluated = lines(tmp_path / "metrics.jsonl")
    assert plain["loss"] is None and plain["grad_norm"] is None and plain["mfu"] is None
    assert plain["head_loss"] == [1.0, None] and plain["phase_seconds"] == RECORD.phase_seconds
    assert not any(key.startswith("eval_") for key in plain)
    assert {"step", "epoch", "images", "top1", "lr", "images_per_second", "step_seconds", "data_wait_seconds"} < set(
        plain
    )
    assert not any(key.startswith(("head_cosine", "head_delta", "delta_")) for key in plain)
    assert {"merge_seconds", "inter_node_bytes", "intra_node_bytes", "heads", "skipped_steps"} < set(plain)
    assert (evaluated["eval_top1"], evaluated["eval_top5"], evaluated["eval_loss"]) == (0.9, 0.99, 0.4)


def test_rewind_forgets_later_and_torn_lines_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.rewind(0)
    assert not path.exists()
    for step in (10, 20, 30):
        writer.write(replace(RECORD, step=step))
    with path.open("a") as file:
        file.write('{"step": 15, "los')
    writer.rewind(20)
    writer.write(replace(RECORD, step=25))
    assert [line["step"] for line in lines(path)] == [10, 20, 25]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    writer.rewind(0)
    assert path.read_bytes() == b""


# progress


def test_the_progress_line() -> None:
    assert format_progress(RECORD, 4000, 754) == (
        "step 1,200/4,000  epoch 3.2  loss 1.234  top-1 56.7 %  12,345 images/s  merge 0.12 s  inter-node 4.7 MB  "
        "left 0:12:34"
    )
    early = replace(RECORD, step=10, inter_node_bytes=0, loss=math.nan)
    assert format_progress(early, 4000, math.inf).startswith("step    10/4,000  epoch 3.2  loss nan")
    assert format_progress(early, 4000, math.inf).endswith("inter-node 0 B  left ?")
    assert format_progress(RECORD, 4000, 100 * 3600 + 61).endswith("left 100:01:01")
    evaluated = replace(RECORD, eval_top1=0.953, eval_top5=0.997, eval_loss=0.21)
    assert format_progress(evaluated, 4000, 0).endswith("left 0:00:00  | eval top-1 95.3 %  top-5 99.7 %  loss 0.210")


def test_the_table_at_the_end() -> None:
    assert format_summary(RECORD, 0.6, 61) == [
        "  steps    1,200, 153,600 images, 3.2 epochs",
        "  speed    12,345 images/s at the end; 0:01:01 since the start",
        "  learning loss 1.234, top-1 56.7 %; best held-out top-1 60.00 %",
        "  time in  forward 60 %, backward 30 %, data_wait 10 %",
        "  network  4.7 MB sent by a node, 31 B per image; full-rank DDP sends 200 times as much",
        "  faults   1 restarts, 0 skipped steps, 2 damaged samples",
    ]
    alone = format_summary(replace(RECORD, inter_node_bytes=0, full_rank_bytes=0, phase_seconds={}), 0.0, 1)
    assert "  network  one node" in alone and not any("time in" in line or "held-out" in line for line in alone)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")]
)
def test_bytes_in_the_progress_line(count: float, text: str) -> None:
    assert f"inter-node {text}  " in format_progress(replace(RECORD, inter_node_bytes=int(count)), 4000, 0)


# peaks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307.4),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


# log


@pytest.mark.usefixtures("clean_log")
def test_rank_0_says_all_and_others_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup(0, tmp_path / "run")
    log.debug("hidden")
    log.info("resumed at step %d", 40)
    logs.progress.info("step 50")
    setup(3, tmp_path / "run", node=1)
    log.info("hidden")
    log.warning("skipped damaged\nsample")
    assert capsys.readouterr().err == (
        "resumed at step 40\nstep 50\n[node 1 rank 3] warning: skipped damaged\nsample\n"
    )
    events = (tmp_path / "run" / "events.log").read_text().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert re.fullmatch(rf"{time} rank 0 info resumed at step 40", events[0])
    assert re.fullmatch(rf"{time} rank 3 warning skipped damaged\\nsample", events[1])
    assert len(events) == 2


def test_events_of_several_processes_do_not_interleave(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lte_scale.log import log, setup; rank = int(sys.argv[1]); "
        "setup(rank, Path(sys.argv[2])); [log.warning('x' * 2000) for _ in range(200)]"
    )
    command = [sys.executable, "-c", program]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)], stderr=subprocess.DEVNULL) for r in range(3)]
    assert [process.wait(20) for process in ranks] == [0, 0, 0]
    events = (tmp_path / "events.log").read_text().splitlines()
    assert len(events) == 600
    assert all(re.fullmatch(r"\S+ rank [012] warning x{2000}", event) for event in events)


@pytest.mark.usefixtures("clean_log")
def test_an_unwritable_run_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: cannot write .*events\.log \(.+\); choose a directory") as caught:
        setup(0, tmp_path / "file")
    assert "\n" not in str(caught.value)
