"""Runs of which everything is known, and the page that a report makes of them."""

from __future__ import annotations

import argparse
import html
import json
import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lte_scale import report

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
