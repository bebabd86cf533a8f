#!/usr/bin/env python3
"""A step of LTE against a step of full-rank AdamW, on one device: images per second, MFU, memory of the state.

    benchmarks/step.py                     ViT-S and ViT-B on a CPU, some 20 minutes
    benchmarks/step.py --device cuda --models vit_large_patch16_224 --rank 64 --batch-size 128
    benchmarks/step.py ... --profile       besides: where a step's time goes

Contestants live in one process and take turns, a few steps each; a ratio compares neighbours in time, the table
has the median of the ratios and their spread. Both sides compute in bf16 under autocast, clip, and step torch's fused
AdamW, each eager and with its blocks compiled; full-rank's better one is what LTE is held against. Images are on the
device already. Writes benchmarks/results/speed_DEVICE.json and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from figures import hardware, write_between_marks
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.profiler import ProfilerActivity, profile

from lte_scale.assemble import adapt, flops_per_image
from lte_scale.config.schema import (
    AdaptersConfig,
    BaseConfig,
    Config,
    EngineConfig,
    ModelConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.metrics.accelerators import peak_tflops
from lte_scale.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 1000


@dataclass(frozen=True)
class Contestant:
    """A training step, and what it trains."""

    step: Callable[[], None]
    trained: list[nn.Parameter]


def full_rank(name: str, images: Tensor, labels: Tensor, *, compiled: bool) -> Contestant:
    """A training step of timm's model as it is."""
    device = images.device
    model = timm.create_model(name, num_classes=CLASSES).to(device)
    for module in model.modules():
        if device.type == "cpu" and getattr(module, "fused_attn", False):  # slow there, and LTE does not use it either
            cast(Any, module).fused_attn = False
    if compiled:
        for block in cast(nn.Sequential, model.blocks):
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images).float()
        F.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, list(model.parameters()))


def configuration(
    name: str, rank: int, heads: int, batch_size: int, *, compiled: bool = False, offloaded: bool = False
) -> Config:
    """`offloaded`: the fp32 master in CPU memory, and its bf16 copy gathered once a window."""
    return Config(
        model=ModelConfig(name=name),
        adapters=AdaptersConfig(rank=rank),
        engine=EngineConfig(name="fsdp" if offloaded else "none"),
        base=BaseConfig(gather="window", offload="cpu") if offloaded else BaseConfig(),
        topology=TopologyConfig(heads_per_node=heads),
        train=TrainConfig(precision="bf16", batch_size=batch_size // heads, compile=compiled),
    )


def lte(config: Config, images: Tensor, labels: Tensor) -> Contestant:
    """A training step of the same model with heads, as the trainer does it."""
    run, heads = adapt(config, CLASSES, images.device), config.topology.heads_per_node

    def step() -> None:
        with run.autocast:
            logits = run.model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none").view(heads, -1).mean(1)
        losses.sum().backward()
        run.optimizer.step(losses.detach(), lambda peak: peak)

    return Contestant(step, list(run.heads.parameters().values()))


def seconds(contestant: Contestant, count: int, device: torch.device) -> float:
    """Of one step, of `count` in a row."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        contestant.step()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def state_bytes(make: Callable[[], Contestant], device: torch.device) -> int:
    """Bytes of weights, gradients and optimizer state on the device."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    contestant = make()
    contestant.step()  # it makes the optimizer's state
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in contestant.trained)
    return torch.cuda.memory_allocated(device) - before + gradients


def profiled(contestant: Contestant, device: torch.device) -> str:
    """The kernels of one step, by their own time."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        contestant.step()
        _wait(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All contestants on one model."""
    torch.manual_seed(0)
    size = arguments.batch_size
    images = torch.randn(size, 3, 224, 224, device=device)
    labels = torch.randint(CLASSES, (size,), device=device)
    makers: dict[str, Callable[[], Contestant]] = {}
    for compiled in (False, True) if arguments.compile == "both" else (arguments.compile == "yes",):
        word = "compiled" if compiled else "eager"
        makers[f"full {word}"] = partial(full_rank, name, images, labels, compiled=compiled)
        for heads in arguments.heads:
            config = configuration(name, arguments.rank, heads, size, compiled=compiled)
            makers[f"lte {heads} {word}"] = partial(lte, config, images, labels)
    if device.type == "cuda":
        config = configuration(name, arguments.rank, 1, size, compiled=arguments.compile != "no", offloaded=True)
        makers["lte 1 offloaded"] = partial(lte, config, images, labels)
    spent = {key: state_bytes(make, device) for key, make in makers.items()} if device.type == "cuda" else {}
    contestants = {key: make() for key, make in makers.items()}
    for contestant in contestants.values():
        seconds(contestant, 3, device)
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        rounds.append({key: seconds(c, arguments.steps, device) for key, c in contestants.items()})
        times = ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in rounds[-1].items())
        print(f"{name} round {number + 1}: {times}", flush=True)
    if arguments.profile:
        for key, contestant in contestants.items():
            print(f"== {name}, {key}\n{profiled(contestant, device)}", flush=True)
    flops = {
        heads: flops_per_image(
            configuration(name, arguments.rank, heads, size),
            CLASSES,
            Topology(nodes=1, ranks_per_node=1, heads_per_node=heads),
        )
        for heads in arguments.heads
    }
    return {
        "batch_size": size,
        "rank": arguments.rank,
        "rounds": rounds,
        "state_bytes": spent,
        "flops_per_image": flops,
    }


def table(results: dict[str, dict[str, Any]], peak: float) -> str:
    """Of every contestant its time, and the ratio of full-rank's better one to it."""
    lines = [
        "| model | contestant | step | images/s against full-rank | MFU | state |",
        "|---|---|---|---|---|---|",
    ]
    for model, found in results.items():
        rounds = found["rounds"]
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        best = min((key for key in medians if key.startswith("full")), key=medians.__getitem__)
        for key, middle in medians.items():
            ratios = sorted(r[best] / r[key] for r in rounds)
            kind = key.split()
            flops = {str(k): v for k, v in found["flops_per_image"].items()}.get(kind[1], 0)
            used = f"{flops * found['batch_size'] / middle / peak:.0%}" if peak and flops else ""
            kept = found["state_bytes"].get(key)
            state = f"{kept / 1e9:.2f} GB" if kept else ""
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append(f"| {model} | {label(kind)} | {1e3 * middle:.0f} ms | {ratio} | {used} | {state} |")
    return "\n".join(lines)


def label(kind: list[str]) -> str:
    if kind[0] == "full":
        return f"full-rank, {kind[1]}"
    return f"LTE, {kind[1]} head{'s' * (kind[1] != '1')}, {kind[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a row, of each contestant in a round")
    parser.add_argument("--compile", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    if device.type == "cuda":  # for the offloaded one: FSDP in a group of one
        dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    results = {name: measure(name, arguments, device) for name in arguments.models}
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{arguments.threads} of {hardware()}"
    peak = 1e12 * (peak_tflops(machine) or 0.0) if cuda else 0.0
    result = {
        "command": f"benchmarks/step.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
        ).stdout.strip(),
        "machine": machine,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
        "models": results,
    }
    path = ROOT / "benchmarks" / "results" / f"speed_{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = (
        f"{machine}, {result['date']}, torch {torch.__version__}, {arguments.batch_size} images, "
        f"rank {arguments.rank}:\n\n{table(results, peak)}"
    )
    print(text)
    write_between_marks(ROOT / "docs" / "performance.md", f"speed_{arguments.device}", text)
    if cuda:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
