"""The sections of a report's page on time, bytes and heads; runs of which not everything is known."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lte_scale.report import anatomy, curves, network
from lte_scale.report.runs import Run
from tests.report_runs import Reader, full_run, make


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
