"""The sections of a report's page on time, bytes, heads and events."""

from __future__ import annotations

import argparse
import html
import json
import math
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lte_scale import report
from lte_scale.report import anatomy, curves, events, network, summary
from lte_scale.report.runs import Run, load

BEGAN = datetime(2026, 11, 27, 9, 30, tzinfo=UTC)
STEP_SECONDS = 0.12
PHASES = {
    "data_wait": 0.004, "forward": 0.03, "backward": 0.055, "collectives": 0.003, "optimizer": 0.008,
    "merge": 0.011, "evaluate": 0.005, "checkpoint": 0.002, "record": 0.001,
}  # fmt: skip
SENT = {
    "inter_node/merge_factor": 21_000, "inter_node/merge_replica": 3_400, "inter_node/metrics": 12,
    "intra_node/base": 5_600_000, "intra_node/head_gradient": 820_000, "intra_node/merge_refresh": 90_000,
    "intra_node/control": 0,
}  # fmt: skip


def moment(step: float, late: float = 0.0) -> datetime:
    """When a step was over; `late` are seconds that restarts have cost."""
    return BEGAN + timedelta(seconds=STEP_SECONDS * step + late)


def full_record(step: int, total: int, heads: int, rng: np.random.Generator, speed: float = 1.0) -> dict[str, Any]:
    """A record of a run in which everything is measured; heads at every 40th step, held-out figures at every 160th."""
    progress = step / total
    losses = 0.25 + 2.1 * math.exp(-5 * progress) + 0.05 * rng.standard_normal(heads) + 0.02 * np.arange(heads)
    top1 = 0.985 - 0.85 * math.exp(-6 * progress)
    return {
        "step": step, "epoch": round(step / 80, 4), "images": 512 * step, "loss": float(losses.mean()),
        "top1": top1 + 0.01 * rng.standard_normal(),
        "lr": 1e-3 * min(1, step / 100) * (0.5 + 0.5 * math.cos(3 * progress)),
        "grad_norm": 0.4 + math.exp(-3 * progress) + 0.1 * rng.random(),
        "images_per_second": speed * 4200 * (0.93 + 0.1 * rng.random()), "step_seconds": STEP_SECONDS / speed,
        "data_wait_seconds": PHASES["data_wait"] * step, "merge_seconds": PHASES["merge"] * step,
        "inter_node_bytes": step * sum(n for key, n in SENT.items() if key.startswith("inter")),
        "intra_node_bytes": step * sum(n for key, n in SENT.items() if key.startswith("intra")),
        "mfu": 0.38, "heads": heads, "skipped_steps": 3 if step > 500 else 0, "bad_samples": step // 90,
        "bad_shards": 1 if step > 700 else 0, "restarts": 2 if step > 960 else 1 if step > 480 else 0,
        "time": moment(step, 95 if step > 960 else 40 if step > 480 else 0).timestamp(),
        "phase_seconds": {name: seconds / speed * step for name, seconds in PHASES.items()},
        "sent_bytes": {key: number * step for key, number in SENT.items()},
        "full_rank_bytes": 10_000_000 * step, "memory_peak_bytes": int(7.1e9 + 3e8 * min(1, step / 200)),
        "head_loss": losses.tolist(), "head_grad_norm": (0.5 + 0.1 * rng.random(heads)).tolist(),
    } | ({} if step % 40 else {
        "head_delta_norm": (0.2 + 0.8 * progress + 0.05 * rng.random(heads)).tolist(),
        "head_cosine_mean": 0.12 + 0.2 * progress, "head_cosine_max": 0.2 + 0.25 * progress,
        "delta_effective_rank": 40.0 - 12 * progress, "delta_rank_ratio": (40.0 - 12 * progress) / 64,
    }) | ({} if step % 160 else {
        "eval_top1": top1 + 0.01, "eval_top5": 0.999, "eval_loss": 0.2 + 2 * math.exp(-5 * progress),
    })  # fmt: skip


# Step and seconds that restarts have cost until then, and what is said.
EVENTS = (
    (0.0, 0, "rank 0 info vit_base on 2 nodes x 2 ranks (cuda): 4 heads of rank 16, engine fsdp, base in scope node"),
    (0.1, 0, "rank 0 info train.norm: auto is torch"),
    (120.0, 0, "rank 1 warning skipped damaged train-000003.tar/sample 17"),
    (121.0, 0, "rank 1 warning skipped damaged train-000003.tar/sample 18"),
    (122.0, 0, "rank 1 warning skipped damaged train-000003.tar/sample 19"),
    (160.0, 0, "rank 0 info saved checkpoint step_00000160 in 1.2 s"),
    (320.0, 0, "rank 0 info saved checkpoint step_00000320 in 1.3 s"),
    (480.0, 0, "rank 0 info stop requested: all ranks end after step 480"),
    (480.1, 0, "rank 0 info saved checkpoint step_00000480 in 1.1 s"),
    (480.2, 0, "rank 0 info stopped after step 480; the same command resumes"),
    (
        480.4,
        40,
        "rank 0 info vit_base on 2 nodes x 2 ranks (cuda): 4 heads of rank 16, engine fsdp, base in scope node",
    ),
    (480.5, 40, "rank 0 info resumed from runs/demo/checkpoints/step_00000480 at step 480 of 1600"),
    (480.6, 40, "rank 0 info changed since that checkpoint: data.workers 2 -> 4"),
    (512.0, 40, "rank 0 warning step 512: head 3 skipped, its loss or gradient is not finite"),
    (513.0, 40, "rank 2 warning step 513: head 3 skipped, its loss or gradient is not finite"),
    (700.0, 40, "rank 0 warning checkpoint step_00000700 could not be written: disk full; training goes on"),
    (960.0, 40, "rank 0 info saved checkpoint step_00000960 in 1.1 s"),
    (1000.0, 40, "rank 3 error on node-b: RuntimeError: <NCCL> communicator was aborted"),
    (
        960.1,
        95,
        "rank 0 info vit_base on 2 nodes x 2 ranks (cuda): 4 heads of rank 16, engine fsdp, base in scope node",
    ),
    (960.2, 95, "rank 0 info resumed from runs/demo/checkpoints/step_00000960 at step 960 of 1600"),
    (1100.0, 95, "rank 0 warning evaluation: left out damaged val-000000.tar/3"),
    (1600.0, 95, "rank 0 info saved checkpoint step_00001600 in 1.0 s"),
)


def full_run(
    path: Path, *, steps: int = 1600, total: int = 1600, heads: int = 4, every: int = 10, speed: float = 1.0
) -> Path:
    """A run of which everything is known, with two restarts and some damage on the way."""
    rng = np.random.default_rng(0)
    config = {
        "run_dir": str(path), "seed": 0, "model": {"name": "vit_base_patch16_224", "arguments": {}},
        "adapters": {"rank": 16, "alpha": 64.0}, "base": {"scope": "node"}, "engine": {"name": "fsdp"},
        "merge": {"every": 20, "local_every": 5}, "train": {"duration": str(total), "batch_size": int(128 * speed)},
        "data": {"train": "https://example.org/a/rather/long/name/of/shards/train-{000000..000999}.tar"},
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    records = [full_record(step, total, heads, rng, speed) for step in range(every, steps + 1, every)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [
        f"{moment(step, late).isoformat(timespec='milliseconds')} {text}\n"
        for step, late, text in EVENTS
        if step <= steps
    ]
    (path / "events.log").write_text("".join(lines))
    return path


def make(*runs: Path, out: Path) -> str:
    """The report's page."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([*map(str, runs), "--out", str(out)])) == 0
    return (out / "report.html").read_text()


class Reader(HTMLParser):
    """The text of every section by its anchor, rows of tables as cells, and titles of dots in a strip."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.rows: dict[str, dict[str, list[str]]] = {}
        self._text = text
        self._section = ""
        self._row: list[str] = []
        self.feed(text.partition("</head>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag == "h2":
            self._section = names["id"] or ""
            self.sections[self._section] = ""
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.rows.setdefault(self._section, {})[self._row[0]] = self._row[1:]
            self._row = []

    def handle_data(self, data: str) -> None:
        data = data.replace("\u00a0", " ")
        self.sections[self._section] += data
        if self._row:
            self._row[-1] += data

    def lane(self, name: str) -> tuple[int, list[str]]:
        """How many events the lane says it has, and what its dots say."""
        ((count, lane),) = re.findall(rf'<div class="lane"><span>{name} <b>(\d+)</b></span>(.*?)</div>', self._text)
        return int(count), [html.unescape(title) for title in re.findall("<title>(.*?)</title>", lane)]


def test_the_lead_tells_the_run(tmp_path: Path) -> None:
    page = Reader(make(full_run(tmp_path / "demo"), out=tmp_path / "out"))
    lead = page.sections[""]
    for sentence in (
        "demo reached 99.29 % held-out top-1 in 1,600 steps; the run has ended.",
        "It saw 819,200 images in 0:03:12, ",
        # 11 of 119 ms, 1,600 times
        "most time went to merging heads: 11.0 ms of 119 ms per step (9.2 %), 0:00:18 in all.",
        # 24,412 B and 10 MB per step of 512 images
        "A node sent 47.7 B per image to others, 410 times fewer than full-rank DDP.",
        "On the way: 2 restarts, 3 skipped steps, 17 damaged samples, 1 damaged shard, 1 error, 1 warning.",
    ):
        assert sentence in lead
    assert list(page.sections) == ["", "summary", "curves", "step-anatomy", "bytes", "heads", "events", "configuration"]


def test_the_time_of_a_step(tmp_path: Path) -> None:
    runs = full_run(tmp_path / "one"), full_run(tmp_path / "fast", speed=2.0)
    page = Reader(make(*runs, out=tmp_path / "out"))
    rows = page.rows["step-anatomy"]
    assert rows["forward pass"] == ["30.0 ms · 25.2 %", "15.0 ms · 25.2 %"]
    assert rows["merging heads"] == ["11.0 ms · 9.2 %", "5.50 ms · 9.2 %"]
    assert rows["writing metrics"] == ["1.00 ms · 0.8 %", "0.50 ms · 0.8 %"]
    assert "119 ms per step." in page.sections["step-anatomy"] and "59.5 ms per step." in page.sections["step-anatomy"]


def test_a_counter_that_began_anew_goes_on() -> None:
    counter = np.array([1.0, 3.0, math.nan, 6.0, 2.0, 2.5])
    np.testing.assert_allclose(anatomy.increases(counter), [1.0, 2.0, 0.0, 3.0, 2.0, 0.5])


def test_bytes_against_full_rank(tmp_path: Path) -> None:
    text = make(full_run(tmp_path / "demo"), out=tmp_path / "out")
    page = Reader(text)
    assert "47.7 B 410 times fewer than full-rank DDP" in page.sections["bytes"]
    assert "19.5 kB gradients of every weight" in page.sections["bytes"]
    assert page.rows["bytes"] == {
        "Between nodes": [], "Inside a node": [],
        "merges: factors": ["33.6 MB"], "merges: replica parameters": ["5.44 MB"], "metrics": ["19.2 kB"],
        "base weights": ["8.96 GB"], "gradients inside heads": ["1.31 GB"], "merges: refreshed weights": ["144 MB"],
    }  # fmt: skip
    # On a log scale from 10 B to 100 kB
    widths = [float(width) for width in re.findall(r'class="track log"[^>]*><span style="width:([\d.]+)%', text)]
    sizes = [math.log10(size / 512) for size in (24_412, 10_000_000)]
    np.testing.assert_allclose(widths, [25 * (size - 1) for size in sizes], atol=0.1)


@pytest.mark.parametrize(
    ("sent", "words"),
    [(0, "nothing at all, unlike full-rank DDP"), (2_000_000, "5.0 times fewer than"), (3e7, "3.0 times more than")],
)
def test_the_factor_in_words(sent: float, words: str) -> None:
    columns = {"step": 1, "images": 512, "inter_node_bytes": sent, "full_rank_bytes": 1e7}
    run = Run("run", {}, {key: np.array([value], float) for key, value in columns.items()})
    assert words in network.fewer(run)


def test_one_node_sends_nothing(tmp_path: Path) -> None:
    run = full_run(tmp_path / "one", steps=100)
    edit(run, lambda record: record.update(inter_node_bytes=0, full_rank_bytes=0, sent_bytes={"intra_node/base": 7}))
    page = Reader(make(run, out=tmp_path / "out"))
    assert "Nothing crossed between nodes." in page.sections[""] and "DDP" not in page.sections["bytes"]
    assert page.rows["bytes"] == {"Inside a node": [], "base weights": ["7 B"]}


def test_events_on_the_axis_and_in_a_list(tmp_path: Path) -> None:
    text = make(full_run(tmp_path / "demo"), out=tmp_path / "out")
    page = Reader(text)
    assert page.lane("Evaluations")[0] == 10 and page.lane("Evaluations")[1][0].startswith("step 160: top-1 ")
    assert page.lane("Checkpoints") == (
        5,
        [f"2026-11-27 {time} saved checkpoint step_{step:08d} in {seconds} s" for time, step, seconds in (
            ("09:30:19", 160, 1.2), ("09:30:38", 320, 1.3), ("09:30:57", 480, 1.1), ("09:32:35", 960, 1.1),
            ("09:34:47", 1600, 1.0),
        )],
    )  # fmt: skip
    assert page.lane("Restarts")[0] == 2 and page.lane("Stops")[0] == 1
    assert page.lane("Skipped steps")[0] == 2 and page.lane("Damaged data")[0] == 4
    assert page.lane("Warnings")[0] == 1 and page.lane("Errors")[0] == 1
    assert page.lane("Errors")[1] == ["2026-11-27 09:32:40 on node-b: RuntimeError: <NCCL> communicator was aborted"]
    assert page.lane("Merges")[0] == 80 and "every 20 steps, inside the node every 5" in page.sections["events"]
    assert "All 22 events" in page.sections["events"] and "<NCCL>" not in text
    assert "3 times, first: skipped damaged train-000003.tar/sample 17 rank 1" in page.sections["events"]
    assert (
        "2 times, first: step 512: head 3 skipped, its loss or gradient is not finite ranks 0, 2"
        in (page.sections["events"])
    )
    # Restarts are also in the curves
    assert text.count("<title>resumed at step 480</title>") == text.count("<title>resumed at step 960</title>") > 6


@pytest.mark.parametrize(
    ("said", "kind", "step", "planned"),
    [
        ("info vit_tiny on 2 nodes x 2 ranks (cpu): 4 heads of rank 16", "start", None, None),
        ("info resumed from runs/a/checkpoints/step_00000040 at step 40 of 200", "restart", 40, 200),
        ("info stop requested: all ranks end after step 17", "stop", 17, None),
        ("info stopped after step 17; the same command resumes", "stop", 17, None),
        ("info saved checkpoint step_00001000 in 1.2 s", "checkpoint", 1000, None),
        ("warning step 12: head 3 skipped, its loss or gradient is not finite", "skipped", 12, None),
        ("warning skipped damaged a.tar/7", "data", None, None),
        ("warning evaluation: left out damaged a.tar/7", "data", None, None),
        ("warning a.tar is damaged after 12 samples: unexpected end", "data", None, None),
        ("warning no progress for 61 s after step 90: rank 3 is slow", "stalled", 90, None),
        ("error hang: no progress for 600 s after step 90; rank 3 is gone; ending the run", "error", 90, None),
        ("error on node-b: RuntimeError: saved checkpoint step_00000001", "error", None, None),
        ("warning checkpoint step_00000007 could not be written: disk full", "warning", None, None),
        ("info train.norm: auto is torch", "note", None, None),
    ],
)
def test_what_an_event_is_about(said: str, kind: str, step: int | None, planned: int | None) -> None:
    event = events._event(f"2026-11-27T09:29:00.123+01:00 rank 12 {said}")
    assert event is not None and (event.kind, event.step, event.planned, event.rank) == (kind, step, planned, 12)


def test_events_lie_between_the_records_around_them() -> None:
    said = [
        "2026-11-27T09:29:00+00:00 rank 0 info early",
        "2026-11-27T10:30:06+01:00 rank 0 info in another zone",
        "2026-11-27T09:30:06+00:00 rank 0 info saved checkpoint step_00000004 in 0.1 s",
        "2026-11-27T09:40:00+00:00 rank 0 info late",
    ]
    found = [event for line in said if (event := events._event(line)) is not None]
    times = np.array([BEGAN.timestamp(), math.nan, BEGAN.timestamp() + 12])
    placed = events.place(found, times, np.array([10.0, 20.0, 30.0]))
    assert [(step, event.message[:5]) for step, event in placed] == [
        (0.0, "early"), (20.0, "in an"), (4.0, "saved"), (30.0, "late"),
    ]  # fmt: skip
    unplaced = events.place(found, np.array([math.nan]), np.array([10.0]))
    assert [event.message[:5] for _, event in unplaced] == ["saved"]


@pytest.mark.parametrize(
    ("steps", "last", "state", "words"),
    [
        (900, "", "at step 900 of 1,600", "in 900 steps of 1,600 (56 %); at the present pace, 0:01:24 remain."),
        (480, "info stop requested: all ranks end after step 480", "stopped at step 480 of 1,600",
         "in 480 steps of 1,600 (30 %), where it was stopped; the same command resumes it."),
        (900, "error on b: OSError: disk <gone>", "failed at step 900 of 1,600",
         "in 900 steps of 1,600 (56 %), where it failed: on b: OSError: disk <gone>."),
    ],
)  # fmt: skip
def test_how_far_a_run_has_come(tmp_path: Path, steps: int, last: str, state: str, words: str) -> None:
    run = full_run(tmp_path / "demo", steps=steps)
    if last:
        with (run / "events.log").open("a") as file:
            file.write(f"{moment(steps, 50).isoformat()} rank 1 {last}\n")
    if steps == 480:
        lines = [line for line in (run / "events.log").read_text().splitlines(True) if "resumed" not in line]
        (run / "events.log").write_text("".join(lines))
    page = Reader(make(run, out=tmp_path / "out"))
    assert words in page.sections[""]
    assert page.rows["summary"]["State"] == [state]


@pytest.mark.parametrize(
    ("length", "planned", "state"), [("20ep", 1600, "ended"), ("40ep", 3200, "at step 1,600 of 3,200"), ("?", None, "")]
)
def test_epochs_tell_the_plan_where_no_event_does(tmp_path: Path, length: str, planned: int | None, state: str) -> None:
    run = full_run(tmp_path / "demo")
    (run / "events.log").unlink()
    (run / "config.yaml").write_text(f"train: {{duration: '{length}'}}\n")
    loaded = load(run, "demo")
    assert loaded.planned == planned or (planned is None and math.isnan(loaded.planned))
    assert summary.state(loaded) == (state or "at step 1,600")


def test_events_may_be_missing_damaged_and_many(tmp_path: Path) -> None:
    run = full_run(tmp_path / "demo")
    (run / "events.log").write_bytes(
        b"\xff\xfe\x00\n"
        b"2026-99-99T00:00:00 rank 0 info no such day\n"
        b"2026-11-27T09:31:00+00:00 rank x info no rank\n"
        b"2026-11-27T09:31:00+00:00 rank 0 warning \x1b[31mred\x1b[0m \xff\n"
        + b"".join(b"2026-11-27T09:31:00+00:00 rank 0 info %s\n" % (b"ab" * i) for i in range(400))
        + b"2026-11-27T09:31:00+00:00 rank 0 info torn"
    )
    page = Reader(make(run, out=tmp_path / "out"))
    assert page.lane("Warnings") == (1, ["2026-11-27 09:31:00 \ufffd[31mred\ufffd[0m \ufffd"])
    assert "All 402 events" in page.sections["events"] and "and 102 more in events.log" in page.sections["events"]
    (run / "events.log").unlink()
    page = Reader(make(run, out=tmp_path / "out"))
    assert "events.log holds no events." in page.sections["events"]
    assert page.lane("Evaluations")[0] == 10


def test_heads_have_lines_or_bands(tmp_path: Path) -> None:
    few, many = full_run(tmp_path / "few", steps=400), full_run(tmp_path / "many", steps=400, heads=8)
    text = make(few, out=tmp_path / "out")
    assert "head 3" in text and 'class="band"' not in text
    text = make(many, out=tmp_path / "out")
    assert "head 3<" not in text and text.count('class="band"') == 3
    text = make(few, many, out=tmp_path / "out")
    assert text.count('class="band"') == 6
    for title in ("Size of what a head learned", "Cosine between heads", "Effective rank of a merge", "Memory peak"):
        assert f"<b>{title}</b>" in text


def test_panels_and_sections_without_data_are_left_out(tmp_path: Path) -> None:
    run = full_run(tmp_path / "old", steps=100)
    new = ("phase_seconds", "sent_bytes", "full_rank_bytes", "memory_peak_bytes", "time", "restarts", "bad_shards")
    edit(
        run,
        lambda record: [record.pop(key) for key in list(record) if key in new or key.startswith(("head_", "delta"))],
    )
    edit(run, lambda record: record.update(grad_norm=None))
    (run / "events.log").unlink()
    text = make(run, out=tmp_path / "out")
    assert list(Reader(text).sections) == ["", "summary", "curves", "events", "configuration"]
    assert "Merges took 9.2" in text and "<b>Gradient norm</b>" not in text and "<b>Learning rate</b>" in text


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every record of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        change(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def harmed(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.3:
        return rng.choice([None, math.nan, math.inf, 0, -1, "text", [], {}, [None], {"a": None}])
    if isinstance(value, dict):
        return {key: harmed(each, rng) for key, each in value.items() if rng.random() < 0.8}
    return [harmed(each, rng) for each in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(10))
def test_no_missing_value_breaks_it(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = full_run(tmp_path / "run", steps=10 * (1 + 2 * seed))
    edit(run, lambda record: record.update({k: harmed(v, rng) for k, v in record.items() if k != "step"}))
    shown = Reader(make(run, out=tmp_path / "out")).sections
    assert not re.search(r"\b(nan|inf)\b", " ".join(text for name, text in shown.items() if name != "configuration"))


def test_many_records_make_a_small_page(tmp_path: Path) -> None:
    text = make(full_run(tmp_path / "long", steps=12_000, total=12_000, every=2, heads=6), out=tmp_path / "out")
    assert len(text) < 500_000
    curve = np.sin(np.arange(50_000.0))
    curve[[777, 31_234]] = 9.0, -9.0
    shown = curves.thinned(curve)
    assert len(shown) <= curves.POINTS + 2 and {0, 777, 31_234, 49_999} <= set(shown.tolist())


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    run = full_run(tmp_path / "demo", steps=400)
    first, second = (re.sub(r"report on [\d: -]+", "", make(run, out=tmp_path / name)) for name in "ab")
    assert first == second


def test_differences_of_configurations(tmp_path: Path) -> None:
    page = Reader(make(full_run(tmp_path / "a"), full_run(tmp_path / "b", speed=2.0), out=tmp_path / "out"))
    assert page.rows["what-differs"] == {"": ["a", "b"], "train.batch_size": ["128", "256"]}
