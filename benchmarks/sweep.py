#!/usr/bin/env python3
"""Final held-out top-1 of a configuration over a grid of settings and seeds, runs alternating between settings.

    benchmarks/sweep.py configs/demo.yaml --name optimizer_state --seeds 3 merge.optimizer_state=keep,reset,reset_b

Writes benchmarks/results/NAME.json (every run, versions, date, commit) and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings(grid: list[str]) -> list[tuple[str, ...]]:
    """`a=1,2 b=3` is (a=1, b=3) and (a=2, b=3)."""
    axes = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (axis.partition("=") for axis in grid)
    ]
    return list(itertools.product(*axes))


def train(config: str, overrides: tuple[str, ...], nodes: int, ranks: int) -> float:
    """Final eval_top1 of one run on emulated nodes."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", str(nodes)]
        command += ["--ranks-per-node", str(ranks), "--", "train", config, *overrides]
        command += [f"run_dir={directory}/run", "metrics.port=0", "checkpoint.every=0"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        last = (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
        return float(json.loads(last)["eval_top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("grid", nargs="+", metavar="key=value,value")
    arguments = parser.parse_args()
    grid = settings(arguments.grid)
    runs: dict[str, list[float]] = {" ".join(setting): [] for setting in grid}
    for seed, setting in itertools.product(range(arguments.seeds), grid):
        top1 = train(arguments.config, (*setting, f"seed={seed}"), arguments.nodes, arguments.ranks_per_node)
        runs[" ".join(setting)].append(top1)
        print(f"{' '.join(setting)} seed={seed}: {top1:.2%}", flush=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=ROOT).strip()
    result = {
        "command": " ".join(["benchmarks/sweep.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, no accelerator",
        "python": platform.python_version(),
        "eval_top1": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"{arguments.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("\n| setting | mean top-1 | lowest | highest |\n|---|---|---|---|")
    for name, found in runs.items():
        print(f"| {name} | {statistics.mean(found):.2%} | {min(found):.2%} | {max(found):.2%} |")


if __name__ == "__main__":
    main()
