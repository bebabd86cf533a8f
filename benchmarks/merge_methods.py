"""Full-rank DDP and FSDP2, and what every method is to the loop of `benchmarks/peers.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lte_scale.config import Config
from lte_scale.topology import Topology


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
    """

    model: nn.Module
    optimizer: AdamW

    @abstractmethod
    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None: ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward; gradients need to be exchanged in the last micro-step of a step alone."""
        return nullcontext()

    @property
    def stalled_seconds(self) -> float | None:
        """Spent so far in exchanges that hold all else up; None for a method that has none of that kind."""
        return None

    def finish(self, steps: int) -> None:
        """After so many steps, end what the method has started. Collective."""
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
