"""DeepSpeed ZeRO-3: the frozen weights are partitioned, its hooks gather them for forward and backward.

DeepSpeed is given the base weights alone, so factors and replica parameters are never partitioned, and no gradient
ever passes through it. A rank keeps one slice of every flattened weight; a merge adds to that slice.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_scale.collectives import Collectives, Group, all_gather_bytes
from lte_scale.config.schema import BaseConfig
from lte_scale.engines.base import Slice, cut, materialise
from lte_scale.model import Heads
from lte_scale.topology import Topology


class DeepSpeedEngine:
    """The base as ZeRO-3 partitions over a node or the world, cut into flat slices of equal length.

    With scope `global` and gather `node` or `window` the partitions are those of a node (the secondary partitions of
    ZeRO++'s hpZ), which the merge alone refreshes from the master; so no weight crosses nodes between merges.

    In bf16 the partitions are bf16 and this rank's fp32 parts stand beside them; in fp32 they are the same memory.
    """

    tied_steps = 2  # DeepSpeed records the order of the layers in the first forward pass and compares it in the next

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        collectives: Collectives,
        base: BaseConfig,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        """`settings`: the DeepSpeed JSON (`lte_scale.config.deepspeed`).

        Raises:
            ValueError: if DeepSpeed is not installed or refuses the settings.
        """
        deepspeed = _ready(device, collectives.topology)
        self.model, self.rank, self.device = model, collectives.topology.rank, device
        self.group = collectives.world if base.crosses_nodes else collectives.node
        if self.group.process_group is None:
            raise RuntimeError("engine deepspeed needs torch.distributed.init_process_group, even for one process")
        self.weights: dict[str, Any] = {}
        try:
            zero = deepspeed.zero.Init(
                data_parallel_group=self.group.process_group, config_dict_or_path=dict(settings), dtype=compute_dtype
            )
        except (ValueError, AssertionError) as error:  # pydantic's have many lines
            raise ValueError(
                f"engine.deepspeed_config: DeepSpeed refuses it: {' '.join(str(error).split())}"
            ) from error
        for name, layer in heads.linears.items():
            # One at a time: a rank holds one whole weight. Init(module=...) would send each of them to all ranks.
            whole = torch.full_like(layer.base.weight, math.nan, dtype=compute_dtype, device=device)
            weight: Any = nn.Parameter(whole, requires_grad=False)
            zero._convert_to_deepspeed_param(weight)
            weight.partition()
            layer.base.weight, self.weights[name] = weight, weight
        materialise(model, device)  # all but the weights
        bases = nn.ModuleList(layer.base for layer in heads.linears.values())
        engine, *_ = deepspeed.initialize(model=bases, config=dict(settings))
        self.partitions = engine.optimizer
        for weight in self.weights.values():
            weight.all_gather_coalesced = _Counted(weight.all_gather_coalesced, collectives, self.group)
        # DeepSpeed's own hook is on `bases`, which nobody calls.
        model.register_forward_pre_hook(lambda *_: self.partitions.get_param_coordinator().reset_step())
        self.parts = {name: self._partition(name).float() for name in self.weights}

    def slice_of(self, name: str, rank: int) -> Slice:
        return cut(tuple(self.weights[name].ds_shape), self.group.size, rank, rows=False)

    def _partition(self, name: str) -> Tensor:
        """This rank's slice, without the padding of the last ranks."""
        start, stop = self.slice_of(name, self.rank)
        partition: Tensor = self.weights[name].ds_tensor
        return partition.data[: stop - start]

    @contextmanager
    def editable(self) -> Iterator[Mapping[str, Tensor]]:
        self.partitions.partition_all_parameters()  # else the next forward could read weights gathered before the edit
        yield self.parts
        for name, part in self.parts.items():
            partition = self._partition(name)
            if partition.data_ptr() != part.data_ptr():
                partition.copy_(part)
        if self.device.type == "cuda":  # DeepSpeed gathers on a stream of its own, which does not wait for this one
            torch.cuda.current_stream().synchronize()


class _Counted:
    """DeepSpeed's gathering of some weights, with the bytes this rank sends for it counted."""

    def __init__(self, gather: Callable[..., Any], collectives: Collectives, group: Group) -> None:
        self.gather, self.collectives, self.group = gather, collectives, group

    def __call__(self, weights: Iterable[Any], **options: Any) -> Any:
        weights = list(weights)
        part = sum(weight.ds_tensor.nbytes for weight in weights)
        with self.collectives.call(self.group, "base", all_gather_bytes(self.group.size, part)):
            return self.gather(weights, **options)


def lacking() -> str:
    """What is missing, and how to get it; empty if the package is there."""
    if importlib.util.find_spec("deepspeed") is None:
        return "'deepspeed' needs the package deepspeed; install it with pip install 'lte-scale[deepspeed]'"
    return ""


def check_installed() -> None:
    """
    Raises:
        ValueError: if the package deepspeed is missing.
    """
    if lack := lacking():
        raise ValueError(f"engine.name: {lack}, or use engine=fsdp")


def imported(device: torch.device) -> Any:
    """The package, told which device it is for, and quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _ready(device: torch.device, topology: Topology) -> Any:
    """The package, on the process group that is there.

    Raises:
        ValueError: if it is not installed.
    """
    check_installed()
    for key, value in (
        ("RANK", topology.rank),
        ("WORLD_SIZE", topology.world_size),
        ("LOCAL_RANK", topology.local_rank),
    ):
        os.environ.setdefault(key, str(value))
    deepspeed = imported(device)
    # Its shared-memory all-reduce, which nothing here calls, would be compiled at the first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_init_required=False)
    return deepspeed
