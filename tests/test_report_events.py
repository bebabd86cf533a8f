"""The events of a report's page: what they are about, where they lie, how far a run has come."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lte_scale.report import events, summary
from lte_scale.report.runs import load
from tests.report_runs import BEGAN, Reader, full_run, make, moment


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


def test_merges_of_windows_that_grow(tmp_path: Path) -> None:
    run = full_run(tmp_path / "demo", steps=100)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("every: 20", "every: 20\n  growth: 0.5"))
    page = Reader(make(run, out=tmp_path / "out"))
    # After 1, 2, 3, 4, 6, 9, 13, 18 (not 19: a window of whole merges in the node), 23, 33, 48, 68 and 88.
    assert page.lane("Merges")[0] == 13


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
