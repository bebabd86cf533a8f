"""What LTE is held against, full-rank: DDP, FSDP2 and DiLoCo, on LTE's model, initial weights, batches and evaluation.

torchrun ... benchmarks/peers.py ddp | fsdp | diloco CONFIG [--marks FIRST LAST]

CONFIG is that of the LTE run: rank r trains on the batches of head r, AdamW and schedule are the configuration's, and
DiLoCo's period is `merge.every`. With marks the run ends at the last one and tells what it sent and how long it took;
without, it trains for `train.duration` and tells the accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from figures import tell
from merge_marks import Marks
from merge_methods import DDP, FSDP, Peer
from torch import nn

from lte_scale.assemble import train_stream
from lte_scale.collectives import Collectives
from lte_scale.config import Config, load_config
from lte_scale.data import Batch, open_index
from lte_scale.evaluate import Evaluator
from lte_scale.initial import base_slice, seed_of
from lte_scale.model import build, initial_std
from lte_scale.precision import with_precision
from lte_scale.state import Schedule
from lte_scale.topology import Topology, from_environment

PATIENCE = timedelta(seconds=600)
CPU = torch.device("cpu")


def full_rank_model(config: Config, classes: int) -> nn.Module:
    """The model that LTE trains, before heads are attached, with the initial weights that LTE gives it."""
    model = build(config.model, classes, seed=config.seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape = module.weight.shape
            matrix = (shape[0], shape[1:].numel())
            values = base_slice(name, matrix, 0, shape.numel(), std=initial_std(module), seed=config.seed)
            module.weight = nn.Parameter(values.view(shape))
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]  # as for LTE: it is slow in backward on a CPU
    return model


def peer_of(method: str, model: nn.Module, config: Config, topology: Topology) -> Peer:
    """Make `model` one that is trained by `method`. Collective."""
    if method == "diloco":
        from merge_diloco import TorchftDiLoCo  # which needs torchft

        return TorchftDiLoCo(model, config, topology)
    return (DDP if method == "ddp" else FSDP)(model, config, topology)


def train_step(
    peer: Peer, batches: Iterator[Batch], config: Config, schedule: Schedule, autocast: torch.autocast, step: int
) -> None:
    """One optimizer step over `train.accumulate` micro-batches, as LTE's trainer has it."""
    torch.manual_seed(seed_of("step", config.seed, step, dist.get_rank()))  # of stochastic depth
    for micro in range(config.train.accumulate):
        batch = next(batches)
        smoothing = config.augment.label_smoothing if batch.targets.ndim == 1 else 0.0
        with peer.micro_step(last=micro + 1 == config.train.accumulate):
            with autocast:
                logits = peer.model(batch.images).float()
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
            (loss / config.train.accumulate).backward()
    if config.optimizer.clip_norm:
        nn.utils.clip_grad_norm_(peer.model.parameters(), config.optimizer.clip_norm)
    for group in peer.optimizer.param_groups:
        group["lr"] = schedule.lr(config.optimizer.lr, step)
    peer.optimizer.step()
    peer.optimizer.zero_grad()


class Measured:
    """The marks of a run, with what its method was held up between them."""

    def __init__(self, marks: Marks, peer: Peer) -> None:
        self.marks, self.peer, self.stalled = marks, peer, 0.0

    def passed(self, step: int) -> None:
        """Called by every rank after every step."""
        self.marks.passed(step)
        if step == self.marks.first:
            self.stalled = self.peer.stalled_seconds or 0.0

    def figures(self) -> dict[str, Any]:
        """Those of the marks, and `merge_seconds`: None where the method has no merges."""
        stalled = self.peer.stalled_seconds
        return {**self.marks.figures(), "merge_seconds": None if stalled is None else stalled - self.stalled}


def run(method: str, config: Config, marked: tuple[int, int] | None) -> dict[str, Any]:
    """Train to the last mark, or to the end and evaluate. Collective. Returns what there is to tell."""
    topology, index = from_environment(), open_index(config.data.train)
    classes = config.model.num_classes or index.num_classes
    schedule = Schedule.of(config, index.samples, topology.heads)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16)
    model = full_rank_model(config, classes)
    parameters = sum(p.numel() for p in model.parameters())
    peer = peer_of(method, model, config, topology)
    measured = Measured(Marks(*marked, topology.ranks_per_node), peer) if marked else None
    batches = train_stream(config, index, classes, topology).iterate()
    steps = marked[1] if marked else schedule.total
    for step in range(1, steps + 1):
        train_step(peer, batches, config, schedule, autocast, step)
        if measured:
            measured.passed(step)
    if measured:
        figures = measured.figures()
    else:
        figures = {**Evaluator(config, classes, Collectives(topology), CPU, autocast)(peer.model), "steps": steps}
    peer.finish(steps)
    return {"parameters": parameters, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("ddp", "fsdp", "diloco"))
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--marks", nargs=2, type=int, metavar=("FIRST", "LAST"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo", timeout=PATIENCE)
    config = with_precision(load_config(arguments.config), CPU)
    tell(run(arguments.method, config, tuple(arguments.marks) if arguments.marks else None))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
