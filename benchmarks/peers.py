"""What LTE is held against, full-rank: DDP, FSDP2 and DiLoCo, on LTE's model, initial weights, batches and evaluation.

torchrun ... benchmarks/peers.py ddp | fsdp | diloco CONFIG [--marks FIRST LAST]

CONFIG is that of the LTE run: rank r trains on the batches of head r, AdamW and schedule are the configuration's, and
DiLoCo's period is `merge.every`. With marks the run ends at the last one and tells what it sent and how long it took;
without, it trains for `train.duration` and tells the accuracy.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from merge_marks import Marks, tell
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from lte_scale.collectives import Collectives
from lte_scale.config import Config, load_config
from lte_scale.data import Batch, TrainStream, open_index
from lte_scale.evaluate import Evaluator
from lte_scale.initial import base_slice, seed_of
from lte_scale.model import build, initial_std
from lte_scale.precision import with_precision
from lte_scale.state import Schedule
from lte_scale.topology import Topology, from_environment

# The outer optimizer of the DiLoCo paper (arXiv 2311.08105).
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9
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


def adamw(model: nn.Module, config: Config) -> AdamW:
    """Fused, decaying matrices alone."""
    c = config.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


class Peer(ABC):
    """A way to train a full-rank model on several nodes.

    Attributes:
        model: is called on images [b, C, S, S] for logits [b, classes].
        stalled_seconds: spent in exchanges that hold all else up, as far as the method has such.
    """

    model: nn.Module
    optimizer: Optimizer
    stalled_seconds: float | None = None

    @abstractmethod
    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None: ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward; gradients need to be exchanged in the last micro-step of a step alone."""
        return nullcontext()

    def check(self, steps: int) -> None:
        """Raise a RuntimeError if what was due in so many steps did not happen."""

    def close(self) -> None:
        """End what the method has started. Collective."""
        dist.barrier()


class DDP(Peer):
    """Gradients all-reduced in bf16, in buckets, while backward goes on."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        self.ddp = self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # By its own name DDP refuses the hook where there is no NCCL, though gloo sums bf16 as well.
        self.ddp.register_comm_hook(dist.group.WORLD, lambda group, bucket: bf16_compress_hook(group, bucket))
        self.optimizer = adamw(model, config)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.ddp.no_sync()


class FSDP(Peer):
    """Every block a unit, sharded over all ranks: gathered in forward and backward, gradients reduced in bf16.

    Weights travel in the precision they are used in.
    """

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        compute = torch.bfloat16 if config.train.bf16 else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (topology.world_size,))
        for block in model.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self.sharded: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=policy)
        self.sharded.set_force_sum_reduction_for_comms(True)  # gloo has no averages
        self.model = model
        self.optimizer = adamw(model, config)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        self.sharded.set_requires_gradient_sync(last)
        return nullcontext()


class DiLoCo(Peer):
    """torchft's: every rank a replica with its own AdamW; every `merge.every` steps Nesterov on their mean change."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        from torchft.local_sgd import DiLoCo as Outer
        from torchft.manager import Manager
        from torchft.process_group import ProcessGroupGloo

        self.model, self.optimizer, self.stalled_seconds = model, adamw(model, config), 0.0
        own = own_address()
        self.lighthouse, lighthouse_address = shared_lighthouse(own, topology)
        # The store that torchft looks for belongs to a replica: here that is one rank.
        self.store = TCPStore(own, 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=PATIENCE),
            load_state_dict=self._load,
            state_dict=self._state,
            min_replica_size=topology.world_size,
            use_async_quorum=False,
            timeout=PATIENCE,
            quorum_timeout=PATIENCE,
            rank=0,
            world_size=1,
            store_addr=own,
            store_port=self.store.port,
            lighthouse_addr=lighthouse_address,
            replica_id=f"rank{topology.rank}",
            hostname=own,
            init_sync=False,  # all ranks draw the same weights
        )
        self.every = config.merge.every
        outer = SGD(model.parameters(), lr=OUTER_LR, momentum=OUTER_MOMENTUM, nesterov=True)

        peer = self

        class Timed(Outer):
            """Takes the time of what follows an inner step: nothing, or the exchange and the outer step."""

            def _step_post_hook(self, *words: Any) -> None:
                began = time.perf_counter()
                super()._step_post_hook(*words)
                peer.stalled_seconds = (peer.stalled_seconds or 0.0) + time.perf_counter() - began

        self.stack = ExitStack()
        self.stack.enter_context(
            Timed(self.manager, [model], self.optimizer, outer, sync_every=config.merge.every, pin_memory=False)
        )

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def check(self, steps: int) -> None:
        if self.manager.current_step() != steps // self.every:
            raise RuntimeError(f"DiLoCo: {self.manager.current_step()} outer steps in {steps} steps, see torchft's log")

    def close(self) -> None:
        self.stack.close()
        super().close()  # the lighthouse, and the stores that others connect to, must outlast the last exchange
        self.manager.shutdown(wait=False)
        super().close()
        if self.lighthouse is not None:
            self.lighthouse.shutdown()


def own_address() -> str:
    """This node's address on the network to the first node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return str(probe.getsockname()[0])


def shared_lighthouse(own: str, topology: Topology) -> tuple[Any, str]:
    """torchft's lighthouse, which rank 0 runs (None elsewhere), and its address."""
    from torchft.coordination import LighthouseServer

    server = None
    address: list[str] = [""]
    if topology.rank == 0:
        server = LighthouseServer(bind="[::]:0", min_replicas=topology.world_size)
        address = [f"http://{own}:{server.address().rpartition(':')[2]}"]
    dist.broadcast_object_list(address, src=0)
    return server, address[0]


PEERS: dict[str, type[Peer]] = {"ddp": DDP, "fsdp": FSDP, "diloco": DiLoCo}


def train_step(
    peer: Peer, batches: Iterator[Batch], config: Config, schedule: Schedule, autocast: torch.autocast, step: int
) -> None:
    """One optimizer step over `train.accumulate` micro-batches, as LTE's trainer has it."""
    torch.manual_seed(seed_of("step", config.seed, step, dist.get_rank()))
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


def stream_of(config: Config, classes: int, topology: Topology) -> TrainStream:
    """The batches of the head that LTE has on this rank."""
    return TrainStream(
        open_index(config.data.train),
        heads=topology.my_heads,
        total_heads=topology.heads,
        member=0,
        members=1,
        batch_size=config.train.batch_size,
        seed=config.seed,
        image_size=config.model.image_size,
        channels=config.model.channels,
        num_classes=classes,
        augment=config.augment,
        data=config.data,
    )


def run(method: str, config: Config, marked: tuple[int, int] | None) -> dict[str, Any]:
    """Train to the last mark, or to the end and evaluate. Collective. Returns what there is to tell."""
    topology = from_environment()
    index = open_index(config.data.train)
    classes = config.model.num_classes or index.num_classes
    schedule = Schedule.of(config, index.samples, topology.heads)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16)
    model = full_rank_model(config, classes)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    marks = Marks(*marked, topology.ranks_per_node) if marked else None
    peer = PEERS[method](model, config, topology)
    batches = stream_of(config, classes, topology).iterate()
    stalled = 0.0
    steps = marked[1] if marked else schedule.total
    for step in range(1, steps + 1):
        train_step(peer, batches, config, schedule, autocast, step)
        if marks:
            marks.passed(step)
            if step == marks.first:
                stalled = peer.stalled_seconds or 0.0
    if marks:
        figures |= marks.figures()
        figures["merge_seconds"] = None if peer.stalled_seconds is None else peer.stalled_seconds - stalled
    else:
        evaluator = Evaluator(config, classes, Collectives(topology), CPU, autocast)
        figures |= evaluator(peer.model) | {"steps": steps}
    peer.check(steps)
    peer.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=PEERS)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--marks", nargs=2, type=int, metavar=("FIRST", "LAST"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo", timeout=PATIENCE)
    config = with_precision(load_config(arguments.config), CPU)
    tell(run(arguments.method, config, tuple(arguments.marks) if arguments.marks else None))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
