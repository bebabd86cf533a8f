#!/usr/bin/env python3
"""What metrics cost a step: blocks of steps with stopwatches, records, instruments and an endpoint, and without.

    benchmarks/metrics.py                                                   1 node x 2 ranks on this machine's CPU
    benchmarks/metrics.py --device cuda --ranks-per-node 1 --model vit_large_patch16_224 --batch-size 64

    benchmarks/metrics.py --alone                                           the calls themselves, without a model

Blocks alternate in one run: with, without, without again. The ratio of the first two is the cost, that of the last two
is the noise of the machine. Writes benchmarks/results/metrics_DEVICE.json and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from figures import hardware, tell, told, write_between_marks

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 10  # metrics.every, as by default
KINDS = ("with", "without", "again")


class Still:
    """A stopwatch that does not run."""

    @contextmanager
    def __call__(self, _: Any) -> Iterator[None]:
        yield

    def lap(self) -> None: ...

    def drain(self) -> list[Any]:
        return []


def work(arguments: argparse.Namespace) -> None:
    """One rank: prints from rank 0 a line of JSON, seconds of every block by kind."""
    from lte_scale.collectives import Collectives
    from lte_scale.config import load_config
    from lte_scale.data import Batch
    from lte_scale.topology import from_environment
    from lte_scale.trainer import Trainer

    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
    config = load_config(
        None,
        [
            *[f"data.train={arguments.data}", f"run_dir={arguments.out}", "metrics.port=19464", "model.channels=1"],
            "watchdog.seconds=0",  # blocks without metrics do not tell it of their steps
            *[f"model.name={arguments.model}", f"model.image_size={arguments.image_size}"],
            *[f"train.batch_size={arguments.batch_size}", "train.duration=1000000", "data.workers=0"],
            *([f"model.arguments={arguments.arguments}"] if arguments.arguments else []),
        ],
    )
    collectives = Collectives(from_environment(), device=device)
    with Trainer(config, collectives, device) as trainer:
        trainer.resume()
        size = arguments.image_size
        images = torch.randn(arguments.batch_size, 1, size, size)
        labels = torch.arange(arguments.batch_size) % 10
        batch = Batch(images, labels, labels, 0)
        running = trainer.clock, collectives.clock, trainer.recorder.board
        still = Still(), Still(), None
        blocks: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(arguments.blocks + 1):
            for kind in KINDS:
                clock, calls, board = running if kind == "with" else still
                trainer.clock = trainer.recorder.clock = clock  # type: ignore[assignment]
                collectives.clock, trainer.recorder.board = calls, board  # type: ignore[assignment]
                _synchronise(device)
                began = time.perf_counter()
                for _ in range(BLOCK):
                    trainer.state.step += 1
                    trainer.batches = iter([batch] * config.train.accumulate)
                    trainer.train_step()
                    if kind == "with":
                        trainer.stepped()
                if kind == "with":
                    trainer.record(False, None)
                _synchronise(device)
                if number:  # the first is for starting up
                    blocks[kind].append(time.perf_counter() - began)
        trainer.recorder.board = running[2]
    tell(blocks)
    dist.destroy_process_group()


def alone() -> None:
    """Microseconds per step of everything that metrics do in it, with an endpoint and a record every 10 steps."""
    from types import SimpleNamespace

    from lte_scale.collectives import Collectives
    from lte_scale.config import load_config
    from lte_scale.recorder import Recorder
    from lte_scale.state import Schedule, TrainState
    from lte_scale.timing import Stopwatch
    from lte_scale.topology import Topology

    cpu, loss = torch.device("cpu"), torch.ones(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    topology = Topology()
    merger: Any = SimpleNamespace(
        heads=SimpleNamespace(ids=topology.my_heads, linears={"layer": torch.nn.Identity()}),
        arrangement=SimpleNamespace(shapes=SimpleNamespace(values=1000)),
        clock=Stopwatch(cpu),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [f"run_dir={folder}", "metrics.port=19464"])
        schedule = Schedule.of(config, 1000, 1)
        recorder = Recorder(config, Collectives(topology), schedule, merger, device=cpu, flops_per_image=lambda: 1)
        state, blocks = TrainState(), []
        recorder.resume(state)
        for _ in range(60):
            began = time.perf_counter()
            for _ in range(BLOCK):
                for phase in ("data_wait", "forward", "backward", "optimizer"):
                    with recorder.clock(phase):
                        pass
                recorder.interval.add(loss, loss, loss, 32)
                state.step += 1
                recorder.stepped(state.step)
            recorder.record(state, 1e-3, everywhere=False)
            blocks.append((time.perf_counter() - began) / BLOCK)
        recorder.close()
    print(f"{1e6 * statistics.median(blocks):.0f} microseconds per step")
    dist.destroy_process_group()


def _synchronise(device: torch.device) -> None:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(arguments: argparse.Namespace, words: list[str]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        subprocess.run([sys.executable, "-m", "lte_scale", "shards", "digits", str(data)], check=True, stdout=-3)
        command = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", "1"]
        command += ["--ranks-per-node", str(arguments.ranks_per_node), "--", str(Path(__file__).resolve()), "--work"]
        command += ["--data", str(data / "train"), "--out", str(Path(folder) / "run"), "--device", arguments.device]
        command += ["--blocks", str(arguments.blocks), *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else None
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    figures = told(done.stdout)
    if done.returncode or figures is None:
        sys.exit(f"{' '.join(words)}: failed\n{done.stdout}{done.stderr}")
    return figures


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of neighbouring blocks."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def row(name: str, blocks: dict[str, list[float]]) -> str:
    step = statistics.median(blocks["without"]) / BLOCK
    cost, noise = ratio(blocks["with"], blocks["without"]) - 1, ratio(blocks["again"], blocks["without"]) - 1
    return f"| {name} | {1e3 * step:.1f} ms | {100 * cost:+.2f} % | {100 * noise:+.2f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--model", help="one model instead of the two of the table")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--arguments", default="")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--alone", action="store_true", help="time the calls themselves, without a model")
    for name in ("--data", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    if arguments.alone:
        alone()
        return
    small = "{patch_size: 2, embed_dim: 64, depth: 3, num_heads: 4}"
    demo = ["--model", "vit_tiny_patch16_224", "--image-size", "8", "--arguments", small, "--batch-size", "32"]
    own = ["--image-size", str(arguments.image_size), "--batch-size", str(arguments.batch_size)]
    cases = {"the demo's": demo, "vit_small_patch16_224": ["--model", "vit_small_patch16_224", *own]}
    if arguments.model:
        cases = {arguments.model: ["--model", arguments.model, *own]}
    results = {name: run(arguments, words) for name, words in cases.items()}
    lines = ["| model | step | cost of metrics | noise |", "|---|---|---|---|"]
    lines += [row(name, blocks) for name, blocks in results.items()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    path = ROOT / "benchmarks" / "results" / f"metrics_{arguments.device}.json"
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "hardware": torch.cuda.get_device_name() if arguments.device == "cuda" else hardware(),
        "torch": importlib.metadata.version("torch"),
        "command": " ".join(["benchmarks/metrics.py", *sys.argv[1:]]),
        "seconds of blocks of 10 steps": results,
    }
    path.write_text(json.dumps(about, indent=1) + "\n")
    facts = (
        f"`{about['command']}`: medians of {arguments.blocks} pairs of blocks; {about['hardware']}, {about['date']}."
    )
    text = "\n".join([*lines, "", facts])
    print(text)
    page = ROOT / "docs" / "observability.md"
    write_between_marks(page, f"metrics_{arguments.device}", text)


if __name__ == "__main__":
    main()
