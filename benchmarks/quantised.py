#!/usr/bin/env python3
"""The base and the optimizer's moments in fewer bits: accuracy for the same samples, and bytes of a large state.

    benchmarks/quantised.py                    minutes on a CPU; needs Debian's dataset-fashion-mnist
    benchmarks/quantised.py --steps 0          the bytes alone, in seconds

Accuracy: a small vision transformer on Fashion-MNIST, four heads in one process, products as `train.precision: auto`
has them on this machine (bf16 or fp32). For every seed the runs take the same steps on the same batches in turn;
what is compared is top-1 of the merged fp32 masters on the 10,000 test images, seed by seed. State: what `plan` counts
of weights, gradients and optimizer on the accelerator for ViT-L/16 in one process, which tests hold against real
tensors, beside 16 bytes a parameter of full-rank AdamW. Writes benchmarks/results/quantised.json and the tables of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from figures import hardware, write_between_marks
from torch import Tensor

from lte_scale.arrangement import Arrangement
from lte_scale.assemble import LTE, adapt
from lte_scale.config.schema import (
    AdaptersConfig,
    BaseConfig,
    Config,
    EngineConfig,
    MergeConfig,
    ModelConfig,
    OptimizerConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.cost import shapes_of
from lte_scale.memory import memory
from lte_scale.model import attach, build
from lte_scale.precision import with_precision
from lte_scale.schedules import lr_at
from lte_scale.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
# base.precision, optimizer.moments
VARIANTS = {
    "fp32": ("auto", "fp32"),
    "base int8": ("int8", "fp32"),
    "base nf4": ("nf4", "fp32"),
    "moments bf16": ("auto", "bf16"),
    "moments log8": ("auto", "log8"),
    "base int8, moments log8": ("int8", "log8"),
    "base nf4, moments log8": ("nf4", "log8"),
}
HEADS, EVERY = 4, 10

SMALL = Config(
    model=ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=28,
        channels=1,
        arguments={"patch_size": 7, "embed_dim": 64, "depth": 3, "num_heads": 4},
    ),
    adapters=AdaptersConfig(rank=16),
    topology=TopologyConfig(heads_per_node=HEADS),
    engine=EngineConfig(name="none"),
    merge=MergeConfig(every=EVERY),
    optimizer=OptimizerConfig(lr=2e-3, replica_lr=2e-3),
)
LARGE = Config(
    model=ModelConfig(name="vit_large_patch16_224", num_classes=1000),
    adapters=AdaptersConfig(rank=64),
    topology=TopologyConfig(heads_per_node=1),
    engine=EngineConfig(name="none"),
    train=TrainConfig(precision="bf16", batch_size=1),
)
STATE = ("master", "compute_shards", "partitions", "gathered", "factors", "replicas", "gradients", "optimizer_state")


def rate(step: int, total: int) -> Callable[[float], float]:
    """From a peak learning rate to that of a step."""
    return lambda peak: lr_at(step, name="cosine", peak=peak, total=total, warmup=20, decay=0, final_ratio=0.01)


def images_and_labels(split: str) -> tuple[Tensor, Tensor]:
    """All of a split, [n, 1, 28, 28] between -1 and 1, and their classes."""
    with gzip.open(SOURCE / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(SOURCE / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels.copy()).float() / 127.5 - 1, torch.from_numpy(labels.copy()).long()


def accuracy(lte: LTE, images: Tensor, labels: Tensor) -> float:
    """Top-1 of the merged weights."""
    with lte.merged() as model, torch.no_grad(), lte.autocast:
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        )
    return right / len(labels)


def holding(config: Config, variant: str, **base: Any) -> Config:
    """`config` with the base and the moments held as the variant says."""
    precision, moments = VARIANTS[variant]
    optimizer = replace(config.optimizer, moments=moments)
    return replace(config, base=BaseConfig(precision=precision, **base), optimizer=optimizer)


def compare(seed: int, steps: int, batch_size: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Any:
    """Top-1 by variant after the same steps on the same batches, and each one's seconds per step."""
    runs = {variant: adapt(holding(replace(SMALL, seed=seed), variant), 10) for variant in VARIANTS}
    spent = dict.fromkeys(runs, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(train[1]), (batch_size,), generator=generator)
        images, labels = train[0][chosen], train[1][chosen]
        for name, lte in runs.items():
            began = time.perf_counter()
            with lte.autocast:
                logits = lte.model(images).float()
            losses = F.cross_entropy(logits, labels, reduction="none").view(HEADS, -1).mean(1)
            losses.sum().backward()
            lte.optimizer.step(losses.detach(), rate(step, steps))
            if lte.merger.due(step) or step == steps:
                lte.merger.merge(step, last=step == steps)
            spent[name] += time.perf_counter() - began
    found = {name: accuracy(lte, *test) for name, lte in runs.items()}
    print(f"seed {seed}: " + ", ".join(f"{name} {top1:.2%}" for name, top1 in found.items()), flush=True)
    return {"seed": seed, "top1": found, "step_seconds": {name: value / steps for name, value in spent.items()}}


def states() -> dict[str, dict[str, int]]:
    """Bytes on the accelerator between steps by what is held how, with the fp32 master there or in CPU memory."""
    model = build(LARGE.model, LARGE.model.num_classes, seed=0)
    with torch.device("meta"):
        heads = attach(model, LARGE.adapters, range(1), seed=0)
    shapes = shapes_of(heads)
    found = {"full-rank AdamW": {"state": 16 * shapes.values}}
    for variant in VARIANTS:
        for offload in ("none", "cpu"):
            spent = memory(Arrangement(shapes, Topology(), holding(LARGE, variant, offload=offload)), activations=0)
            key = f"{variant}, master {'in CPU memory' if offload == 'cpu' else 'beside it'}"
            found[key] = {part: getattr(spent, part) for part in STATE}
    return found


def state_table(found: dict[str, dict[str, int]]) -> str:
    whole = sum(found["full-rank AdamW"].values())
    lines = ["| held | base as products read it | state | of full-rank AdamW's |", "|---|---|---|---|"]
    for name, parts in found.items():
        total, held = sum(parts.values()), parts.get("gathered", 0)
        shown = f"{held / 1e6:.0f} MB" if held else ""
        lines.append(f"| {name} | {shown} | {total / 1e9:.2f} GB | {total / whole:.3f} (1/{whole / total:.1f}) |")
    return "\n".join(lines)


def accuracy_table(runs: list[Any]) -> str:
    lines = [
        "| held | top-1, mean over seeds | by seed | against fp32, same seed | step against fp32 |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        top1 = [run["top1"][name] for run in runs]
        off = [100 * (run["top1"][name] - run["top1"]["fp32"]) for run in runs]
        times = statistics.median(run["step_seconds"][name] / run["step_seconds"]["fp32"] for run in runs)
        lines.append(
            f"| {name} | {statistics.mean(top1):.2%} | {', '.join(f'{value:.2%}' for value in top1)} | "
            f"{statistics.mean(off):+.2f} points ({min(off):+.2f} to {max(off):+.2f}) | {times:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128, help="images of all heads together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page, path = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results" / "quantised.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result["state_bytes"] = states()
    today, commit = datetime.date.today().isoformat(), _commit()
    table = state_table(result["state_bytes"])
    text = f"{LARGE.model.name}, rank 64, one head, products in bf16, counted by `plan`:\n\n{table}"
    print(text, flush=True)
    write_between_marks(page, "quantised_state", text)
    if arguments.steps:
        products = with_precision(SMALL, torch.device("cpu")).train.precision
        train, test = images_and_labels("train"), images_and_labels("t10k")
        result["accuracy"] = {
            "command": f"benchmarks/quantised.py {' '.join(sys.argv[1:])}".strip(),
            "date": today,
            "commit": commit,
            "products": products,
            "machine": f"1 of {hardware()}",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
            "runs": [
                compare(seed, arguments.steps, arguments.batch_size, train, test) for seed in range(arguments.seeds)
            ],
        }
        images = arguments.steps * arguments.batch_size
        text = (
            f"{result['accuracy']['machine']}, {today}, {arguments.steps} steps, {images:,} images, {HEADS} heads of "
            f"rank {SMALL.adapters.rank}, merged every {EVERY} steps, products in {products}:\n\n"
            f"{accuracy_table(result['accuracy']['runs'])}"
        )
        print(text)
        write_between_marks(page, "quantised_accuracy", text)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str:
    return subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True, cwd=ROOT).strip()


if __name__ == "__main__":
    main()
