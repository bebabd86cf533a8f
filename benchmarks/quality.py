#!/usr/bin/env python3
"""Accuracy for the same samples: LTE beside full-rank training, DiLoCo, LoRA and ReLoRA, in the same trainer.

    benchmarks/quality.py --hours 1                      what is missing of all rows, for at most about an hour
    benchmarks/quality.py --duration 5ep ROW [ROW ...]   of these rows, with longer runs
    benchmarks/quality.py --precision fp32               as on a CPU without instructions for bf16

Real images (Fashion-MNIST), a vision transformer of half a million parameters, one process, or two emulated nodes where
it is about what crosses between them. A row's learning rate is tuned on seed 0, the same way for all: doubled or halved
from the same start until the best has a worse one on either side; at the best one further seeds are run. LTE's rate is
the dense equivalent one (docs/recipes.md); alpha is not tuned.

A run that is in benchmarks/results/quality.json is not repeated; every run is added when it ends. docs/quality.md is
written at the end (`--hours 0`: that alone).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import hardware
from quality_page import write_page

from lte_scale.precision import fast_bf16

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
IMAGES_PER_STEP = 256
START = 2e-3
BETWEEN_NODES = {
    "int8 between nodes": ("merge.precision=int8",),
    "int4 between nodes": ("merge.precision=int4",),
    "int8, merges 3 steps under way": ("merge.precision=int8", "merge.delay=3"),
    "T=20, 2 fragments, int8, 3 steps under way": (
        "merge.every=20",
        "merge.fragments=2",
        "merge.precision=int8",
        "merge.delay=3",
    ),
}
AVERAGE = ("merge.outer=average", "merge.outer_lr=1", "merge.outer_momentum=0.9")  # for rows that say nothing of it
NESTEROV = ("merge.outer=nesterov", "merge.outer_lr=0.8", "merge.outer_momentum=0.5")
Run = dict[str, Any]

COMMON = (
    "engine=none",
    "data.workers=0",
    "metrics.port=0",
    "metrics.every=1000000",
    "checkpoint.every=0",
    "schedule.warmup=20",
    "evaluate.every=75",
    "adapters.alpha=0",
)


@dataclass(frozen=True)
class Row:
    """A setting.

    Attributes:
        seeds: how many it is to have (1: for a trend, no comparison).
        tuned: at a rate of its own, or at LTE's.
        nodes: of one rank.
    """

    overrides: tuple[str, ...]
    seeds: int = 1
    tuned: bool = True
    nodes: int = 1

    def command(self, rate: float, seed: int, duration: str, precision: str) -> tuple[str, ...]:
        own = (f"optimizer.lr={rate:g}", f"optimizer.replica_lr={rate:g}", f"train.duration={duration}", f"seed={seed}")
        return (*COMMON, f"train.precision={precision}", *self.overrides, *own)


def _heads(count: int) -> tuple[str, ...]:
    return (f"topology.heads_per_node={count}", f"train.batch_size={IMAGES_PER_STEP // count}")


def _one(method: str, seeds: int = 3) -> Row:
    return Row((f"method={method}", *_heads(1)), seeds=seeds)


def _lte(*overrides: str, heads: int = 8, seeds: int = 1, tuned: bool = False) -> Row:
    """LTE or a variation of it: at LTE's rate, or tuned where another one is known to be better."""
    return Row(("method=lte", *_heads(heads), *(overrides or NESTEROV)), seeds=seeds, tuned=tuned)


def _on_nodes(*overrides: str, nodes: int = 2, heads: int = 8, tuned: bool = False) -> Row:
    """LTE's heads on nodes of one rank: in fp32, merged by all at once, the same run as in one process, to rounding."""
    placed = (*_heads(heads), f"topology.heads_per_node={heads // nodes}", "engine=fsdp")
    return Row(("method=lte", *placed, *NESTEROV, *overrides), seeds=3, tuned=tuned, nodes=nodes)


ROWS: dict[str, Row] = {
    "full": _one("full", seeds=8),
    "lte": _lte(seeds=8, tuned=True),
    "lte, plain averaging": _lte("merge.outer=average", seeds=3),
    "diloco": Row(("method=diloco", *_heads(8), "merge.outer_lr=0.7", "merge.outer_momentum=0.9"), seeds=3),
    "relora": _one("relora"),
    "lora": _one("lora"),
    **{f"lte T={T}": _lte(*NESTEROV, f"merge.every={T}", tuned=T == 50) for T in (1, 20, 50)},
    "lte, growing windows": _lte(*NESTEROV, "merge.growth=0.1", seeds=8),
    "lte T=50, growing windows": _lte(*NESTEROV, "merge.every=50", "merge.growth=0.1", seeds=3),
    **{f"lte rank={r}": _lte(*NESTEROV, f"adapters.rank={r}") for r in (4, 64)},
    **{f"lte heads={h}": _lte(heads=h, tuned=h == 32) for h in (1, 4, 32)},
    **{f"lte, base in {p}": _lte(*NESTEROV, f"base.precision={p}", seeds=8) for p in ("int8", "nf4")},
    "lte T=50, every 5 in two nodes": _on_nodes("merge.every=50", "merge.local_every=5"),
    "lte T=50, growing, every 5 in two nodes": _on_nodes("merge.every=50", "merge.growth=0.1", "merge.local_every=5"),
    "lte heads=32, every 2 in four nodes": _on_nodes("merge.local_every=2", heads=32, nodes=4, tuned=True),
    **{f"lte, {what}": _on_nodes(*overrides) for what, overrides in BETWEEN_NODES.items()},
}


class Bench:
    """The runs there are, and the next one to make."""

    def __init__(self, data: Path, duration: str, precision: str) -> None:
        self.data, self.duration, self.precision = data, duration, precision

    @property
    def runs(self) -> list[Run]:
        """Read anew every time: several of these may run side by side, of other rows each."""
        runs: list[Run] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
        return runs

    def top1(self, name: str, rate: float, seed: int = 0) -> float | None:
        """The final accuracy of a run, if it has been made."""
        wanted = list(ROWS[name].command(rate, seed, self.duration, self.precision))
        return next((run["curve"][-1]["top1"] for run in self.runs if run["overrides"] == wanted), None)

    def missing(self, name: str) -> tuple[float, int] | None:
        """Learning rate and seed of the next run of a row: first those that bracket the best rate, then seeds."""
        row, rate = ROWS[name], START
        if not row.tuned:  # a variation of LTE, at LTE's rate
            found = self.best_rate("lte")
            return None if found is None else self._missing_seed(name, found, 0)
        for factor in (2.0, 0.5):
            while True:
                here, there = self.top1(name, rate), self.top1(name, rate * factor)
                if here is None:
                    return rate, 0
                if there is None:
                    return rate * factor, 0
                if there <= here:
                    break
                rate *= factor
        return self._missing_seed(name, rate, 1)

    def _missing_seed(self, name: str, rate: float, first: int) -> tuple[float, int] | None:
        seeds = (seed for seed in range(first, ROWS[name].seeds) if self.top1(name, rate, seed) is None)
        return next(((rate, seed) for seed in seeds), None)

    def best_rate(self, name: str) -> float | None:
        """The tuned rate, once it is."""
        rates = [START * 2.0**k for k in range(-8, 9)]
        tried = {rate: top1 for rate in rates if (top1 := self.top1(name, rate)) is not None}
        missing = self.missing(name) if ROWS[name].tuned else None
        return None if not tried or (missing and missing[1] == 0) else max(tried, key=tried.__getitem__)

    def make(self, name: str, rate: float, seed: int) -> None:
        overrides = ROWS[name].command(rate, seed, self.duration, self.precision)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            nodes = ROWS[name].nodes
            command = [sys.executable, "-m", "lte_scale"]
            if nodes > 1:
                command = [sys.executable, "launchers/emulate.py", "--nodes", str(nodes), "--ranks-per-node", "1", "--"]
            command += ["train", "configs/vit_fashion.yaml", *AVERAGE, *overrides]
            command += [f"run_dir={directory}/run", f"data.train={self.data}/train", f"data.val={self.data}/val"]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            records = [
                json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()
            ]
        curve = [{"images": r["images"], "top1": r["eval_top1"]} for r in records if "eval_top1" in r]
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True, cwd=ROOT).strip()
        run: Run = {
            "row": name,
            "rate": rate,
            "seed": seed,
            "duration": self.duration,
            "precision": self.precision,
            "overrides": overrides,
            "curve": curve,
            "seconds": round(time.monotonic() - began, 1),
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "hardware": hardware(),
            "torch": torch.__version__,
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        }
        runs = [*self.runs, json.loads(json.dumps(run))]
        RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        print(f"{name} rate={rate:g} seed={seed}: {curve[-1]['top1']:.2%}", flush=True)


def shards(directory: Path) -> Path:
    """Fashion-MNIST as shards, converted once."""
    if not (directory / "val").exists():
        subprocess.run([sys.executable, "-m", "lte_scale", "shards", str(SOURCE), str(directory)], check=True, cwd=ROOT)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if there is none")
    parser.add_argument("--duration", default="450", help="of every run, as train.duration")
    own = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=own, help=f"of products; here {own}")
    parser.add_argument("--hours", type=float, default=24.0, help="start no run after so long")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "fashion")
    arguments = parser.parse_args()
    if unknown := [row for row in arguments.rows if row not in ROWS]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    ends = time.monotonic() + 3600 * arguments.hours
    bench = Bench(shards(arguments.data), arguments.duration, arguments.precision)
    for name in arguments.rows or ROWS:
        while (missing := bench.missing(name)) and time.monotonic() < ends:
            bench.make(name, *missing)
    write_page(ROOT / "docs" / "quality.md", bench.runs, list(ROWS))


if __name__ == "__main__":
    main()
