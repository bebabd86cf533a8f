#!/usr/bin/env python3
"""Milliseconds of one step of the heads' optimizer, optimizers alternating, over the tensors of one head.

    benchmarks/optimizers.py --device cpu adamw deepspeed
    benchmarks/optimizers.py --device cuda adamw apex deepspeed

Writes benchmarks/results/optimizers_DEVICE.json (every step, versions, date, commit) and prints the medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from figures import processor
from torch import nn
from torch.optim import Optimizer

from lte_scale.adam import build_adam, choose
from lte_scale.config.schema import AdaptersConfig, ModelConfig
from lte_scale.model import attach, build

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"vit_tiny_patch16_224": 32, "vit_small_patch16_224": 32, "vit_base_patch16_224": 64}  # rank


def parameters_of(model: str, device: torch.device) -> list[nn.Parameter]:
    """Factors and replica parameters of one head, with gradients."""
    heads = attach(build(ModelConfig(name=model), 1000, seed=0), AdaptersConfig(rank=MODELS[model]), range(1), seed=0)
    parameters = [nn.Parameter(p.detach().to(device)) for p in heads.parameters().values()]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return parameters


def step_ms(optimizer: Optimizer, device: torch.device) -> float:
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="+", metavar="OPTIMIZER")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    runs: dict[str, dict[str, list[float]]] = {}
    for model in MODELS:
        groups: list[dict[str, Any]] = [{"params": parameters_of(model, device), "weight_decay": 0.1}]
        optimizers = {
            name: build_adam(choose(name, device), groups, betas=(0.9, 0.999), eps=1e-8, device=device)
            for name in arguments.names
        }
        for optimizer in optimizers.values():  # warm-up
            step_ms(optimizer, device)
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for turn in range(arguments.steps):
            for name in sorted(optimizers, reverse=bool(turn % 2)):
                times[name].append(round(step_ms(optimizers[name], device), 4))
        runs[model] = times
        print(model, {name: f"{statistics.median(values):.2f} ms" for name, values in times.items()}, flush=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=ROOT).strip()
    result = {
        "command": " ".join(["benchmarks/optimizers.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "milliseconds": runs,
    }
    (ROOT / "benchmarks" / "results" / f"optimizers_{device.type}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
