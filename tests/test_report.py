"""The report of finished, running and damaged runs."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from lte_scale import report
from lte_scale.report import curves, words


def write_run(path: Path, config: Mapping[str, Any], records: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def configuration(path: Path, every: int, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": str(path),
        "seed": 0,
        "model": {"name": "vit_tiny_patch16_224", "arguments": {}},
        "adapters": {"rank": 16, "alpha": 64.0},
        "base": {"scope": "node"},
        "engine": {"name": "fsdp"},
        "merge": {"every": every, "local_every": 0},
        "data": {"train": "https://example.org/train-{000..009}.tar"},
        **sections,
    }


def record(step: int, top1: float | None = None, speed: float = 1000.0, sent: int = 0) -> dict[str, Any]:
    line = {
        "step": step, "epoch": step / 100, "images": 80 * step, "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 0.5,
        "images_per_second": speed, "step_seconds": 80 / speed, "data_wait_seconds": 0.01 * step,
        "merge_seconds": 0.004 * step, "inter_node_bytes": sent, "intra_node_bytes": 0, "mfu": None, "top1": 0.5,
        "heads": 8 if step % 20 == 0 else 4, "skipped_steps": 1, "bad_samples": 0,
    }  # fmt: skip
    return line | ({} if top1 is None else {"eval_top1": top1, "eval_top5": 0.99, "eval_loss": 0.3})


@pytest.fixture
def short(tmp_path: Path) -> Path:
    records = [
        record(10), record(20, 0.91, 900.0, 160_000), record(30, speed=1100.0, sent=160_000),
        record(40, 0.8765, 1000.0, 320_000),
    ]  # fmt: skip
    return write_run(tmp_path / "a" / "short", configuration(tmp_path / "a" / "short", 20), records)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    records = [record(step, 0.5 + step / 1000 if step % 200 == 0 else None, 2000.0) for step in range(10, 401, 10)]
    records[3]["loss"] = None
    config = configuration(tmp_path / "long", 50, seed=7, merge={"every": 50, "local_every": 10})
    return write_run(tmp_path / "long", config, records)


class Page(HTMLParser):
    """Tables as rows of cell texts, and every attribute that could load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: set[str] = set()
        self.loads: list[str] = []
        self._cell = self._strong = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        self._strong = tag == "strong"
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data
        if self._strong:
            self.bold.add(data)
            self._strong = False

    def row(self, label: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row and row[0] == label]
        return found


def make(*runs: Path, out: Path | None = None) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([*map(str, runs), *(["--out", str(out)] if out else [])]))


def test_two_runs_compared(short: Path, long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert make(short, long, out=out) == 0
    assert capsys.readouterr().out == f"wrote {out / 'report.png'}\nwrote {out / 'report.html'}\n"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.png"]
    page = Page(out / "report.html")
    expected = {
        "Model": ["vit_tiny_patch16_224"] * 2,
        "Heads": ["8", "8"],
        "Rank r": ["16", "16"],
        "Merge period T, steps": ["20", "50 (in the node 10)"],
        "Scope of the base": ["node", "node"],
        "Engine": ["fsdp", "fsdp"],
        "Steps": ["40", "400"],
        "Images": ["3,200", "32,000"],
        "Best held-out top-1": ["91.00 %", "90.00 %"],
        "Last held-out top-1": ["87.65 %", "90.00 %"],
        "Skipped steps": ["1", "1"],
        "Images per second, median": ["1,000", "2,000"],
        "Training time": ["0:00:03", "0:00:16"],
        # 40 steps at 80, 80 / 0.9, 80 / 1.1 and 80 ms; 0.16 s of it in merges
        "Share of it in merges": [f"{16 / (10 * (0.08 + 0.08 / 0.9 + 0.08 / 1.1 + 0.08)):.2f} %", "10.00 %"],
        "Bytes between nodes": ["320 kB", "0 B"],
        "Bytes between nodes, per image": ["100 B", "0 B"],
        "seed": ["0", "7"],
        "merge.every": ["20", "50"],
        "merge.local_every": ["0", "10"],
    }
    assert {label: page.row(label) for label in expected} == expected
    assert {"91.00 %", "90.00 %", "2,000"} <= page.bold
    assert not {"1,000", "87.65 %"} & page.bold
    labels = {row[0] for row in page.rows if row}
    assert "MFU, median" not in labels and "adapters.rank" not in labels and "run_dir" not in labels


def test_the_page_loads_nothing_from_elsewhere(short: Path) -> None:
    assert make(short) == 0
    page = Page(short / "report.html")
    text = (short / "report.html").read_text()
    assert page.loads and all(load.startswith("#") and f'id="{load[1:]}"' in text for load in page.loads)
    assert not re.search(r"""(src|href|srcset)\s*=\s*["']?\s*(https?:)?//|@import|url\(|<script""", text)
    assert "default-src 'none'" in text


def test_the_picture_shows_six_panels(short: Path, long: Path) -> None:
    assert make(short, long) == 0
    pixels = imread(short / "report.png")[..., :3]
    assert pixels.shape == (1140, 2100, 3)
    for row in np.array_split(pixels, 2):
        for part in np.array_split(row, 3, axis=1):
            coloured = np.ptp(part, axis=2) > 0.3  # curves are the only thing in colour
            assert coloured.sum() > 300


@pytest.mark.filterwarnings("error")
def test_a_run_that_has_just_begun_and_is_being_written(tmp_path: Path) -> None:
    first = record(10) | {"loss": None, "grad_norm": None}
    run = write_run(tmp_path / "begun", configuration(tmp_path, 20), [first])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert make(run) == 0
    page = Page(run / "report.html")
    assert page.row("Steps") == ["10"]
    assert not any(row[:1] == ["Best held-out top-1"] for row in page.rows)
    assert "begun trained in 10 steps." in (run / "report.html").read_text()


def test_runs_are_told_apart_and_named_once(short: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "b" / "<short>", configuration(tmp_path, 20), [record(10)])
    same = write_run(tmp_path / "b" / "short", configuration(tmp_path, 20), [record(10)])
    assert make(short, other, same, short, out=tmp_path / "out") == 0
    heads = Page(tmp_path / "out" / "report.html").rows[0]
    assert heads == ["", "a/short", "b/<short>", "b/short"]
    assert "<short>" not in (tmp_path / "out" / "report.html").read_text()


def test_smoothing_keeps_a_constant_and_bridges_gaps() -> None:
    values = np.full(200, 3.0)
    values[90:92] = math.nan
    np.testing.assert_allclose(curves.smooth(values), 3.0)
    line = np.arange(200.0)
    np.testing.assert_allclose(curves.smooth(line)[5:-5], line[5:-5])
    assert np.isnan(curves.smooth(np.array([math.nan]))).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (7, "7 B"), (23.04, "23.0 B"), (1500, "1.50 kB"), (472e6, "472 MB"), (999.6e6, "1.00 GB"),
     (0.25, "0.25 B"), (12_345e12, "12,345 TB")],
)  # fmt: skip
def test_sizes(value: float, text: str) -> None:
    assert words.size(value) == text


def break_nothing(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def break_middle(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")


def break_config(run: Path) -> None:
    (run / "config.yaml").write_text("model: {name: [\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: cannot be read \(No such file"),
        (lambda run: (run / "config.yaml").unlink(), r"config\.yaml: cannot be read \(No such file"),
        (break_nothing, r"metrics\.jsonl: holds no record yet"),
        (break_middle, r"metrics\.jsonl:2: damaged record '\{\"step\": 20, .*'; delete that line"),
        (break_config, r"config\.yaml: no valid YAML"),
        (lambda run: (run / "config.yaml").write_text("just words"), r"config\.yaml: holds str, not the sections"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), r"metrics\.jsonl: cannot be read \(no UTF-8"),
    ],
)
def test_a_damaged_run_is_one_message(short: Path, harm: Any, message: str) -> None:
    harm(short)
    with pytest.raises(ValueError, match=message) as caught:
        make(short)
    assert "\n" not in str(caught.value)
    assert not list(short.glob("report*"))


def test_a_missing_run_and_an_unwritable_output_are_one_message(short: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such run directory; name one"):
        make(short, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file \(.+\); name another directory with --out"):
        make(short, out=tmp_path / "file")
    assert not list(short.glob("report*"))
