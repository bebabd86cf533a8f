#!/usr/bin/env python3
"""Step time, merge time and peak memory of the engines in every scope, runs alternating, medians.

    benchmarks/engines.py                                                   2 nodes x 2 ranks on this machine's CPU
    benchmarks/engines.py --device cuda --nodes 1 --ranks-per-node 1        one GPU

Writes benchmarks/results/engines_DEVICE.json (every run's figures, versions, date, commit) and the table of
docs/engines.md.
`none` is one process without a network, for scale: it is given one head and the cores of one rank.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from figures import tell, told, write_between_marks

ROOT = Path(__file__).resolve().parent.parent
EVERY = 4
PLACES = [("node", "pass"), ("node", "window"), ("global", "pass"), ("global", "node"), ("global", "window")]
Case = tuple[str, str, str]


def cases(nodes: int) -> list[Case]:
    """(engine, scope, gather); with one node the scopes are one."""
    places = PLACES if nodes > 1 else PLACES[:2]
    return [("none", "node", "pass"), *((engine, *place) for place in places for engine in ("fsdp", "deepspeed"))]


def work(case: Case, arguments: argparse.Namespace) -> None:
    """One rank of one run: prints a line of JSON from rank 0."""
    from lte_scale.assemble import assemble
    from lte_scale.collectives import Collectives
    from lte_scale.config import load_config
    from lte_scale.topology import from_environment

    engine, scope, gather = case
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
    config = load_config(
        None,
        [
            f"engine={engine}",
            f"base={{scope: {scope}, gather: {gather}}}",
            f"model.name={arguments.model}",
            f"merge={{every: {EVERY}}}",
            f"train.batch_size={arguments.batch_size}",
        ],
    )
    before = _memory(device, start=True)
    lte = assemble(config, 1000, Collectives(from_environment()), device)
    images, labels = torch.randn(arguments.batch_size, 3, 224, 224, device=device), torch.arange(arguments.batch_size)
    steps, merges = [], []
    for step in range(1, arguments.steps + 1):
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = lte.model(images).float()
        loss = F.cross_entropy(logits, labels.to(device))
        loss.backward()
        lte.optimizer.step(loss.detach().view(1))
        stepped = _now(device)
        if lte.merger.due(step):
            lte.merger.merge(step)
            merges.append(_now(device) - stepped)
        if step > 2 * EVERY:  # a window to start up, and one for DeepSpeed to learn the order of the layers
            steps.append(stepped - began)
    figures = {"step_seconds": statistics.median(steps), "merge_seconds": statistics.median(merges[1:])}
    figures["memory_bytes"] = _memory(device) - before
    tell(figures)
    dist.destroy_process_group()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: torch.device, *, start: bool = False) -> int:
    """Peak of allocated (CUDA) or resident (CPU) bytes since the call with `start`, which returns what is there."""
    if device.type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def run(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """One job on emulated nodes."""
    nodes, ranks = (1, 1) if case[0] == "none" else (arguments.nodes, arguments.ranks_per_node)
    command = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", str(nodes)]
    command += ["--ranks-per-node", str(ranks), "--", str(Path(__file__).resolve()), "--case", *case]
    command += ["--model", arguments.model, "--steps", str(arguments.steps), "--device", arguments.device]
    command += ["--batch-size", str(arguments.batch_size)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    figures = told(done.stdout)
    if done.returncode or figures is None:
        sys.exit(f"{' '.join(case)}: failed\n{done.stdout}{done.stderr}")
    return figures


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds."""
    lines = ["| engine | scope | gather | step | merge | memory of a rank |", "|---|---|---|---|---|---|"]
    for name, figures in runs.items():
        engine, scope, gather = name.split()
        step, merge, memory = (
            statistics.median(f[key] for f in figures) for key in ("step_seconds", "merge_seconds", "memory_bytes")
        )
        place = f"{scope} | {gather}" if engine != "none" else "- | -"
        lines.append(f"| {engine} | {place} | {1e3 * step:.0f} ms | {1e3 * merge:.0f} ms | {memory / 1e6:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        work(tuple(arguments.case), arguments)
        return
    runs: dict[str, list[dict[str, float]]] = {" ".join(case): [] for case in cases(arguments.nodes)}
    for number in range(arguments.rounds):
        for case in cases(arguments.nodes):
            figures = run(case, arguments)
            runs[" ".join(case)].append(figures)
            print(f"round {number + 1}: {' '.join(case)}: {figures}", flush=True)
    result: dict[str, Any] = {
        "command": f"benchmarks/engines.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=ROOT).strip(),
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "deepspeed")},
        "model": arguments.model,
        "nodes": arguments.nodes,
        "ranks_per_node": arguments.ranks_per_node,
        "batch_size_per_rank": arguments.batch_size,
        "merge_every": EVERY,
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"engines_{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = (
        f"{arguments.model}, {arguments.batch_size} images per rank, {arguments.nodes} x {arguments.ranks_per_node} "
        f"ranks, {result['machine']}, {result['date']}:\n\n{table(runs)}"
    )
    print(text)
    page = ROOT / "docs" / "engines.md"
    write_between_marks(page, f"engines_{arguments.device}", text)


if __name__ == "__main__":
    main()
