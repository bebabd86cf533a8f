"""FSDP2: every block is one unit; factors and replica parameters stay whole and local."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lte_scale.collectives import Collectives
from lte_scale.config.schema import BaseConfig
from lte_scale.engines.base import Slice, cut, materialise
from lte_scale.model import Heads


class FSDPEngine:
    """The base as DTensors over a node or the world, cut along rows as `torch.chunk` cuts.

    With `base.gather: window` a unit is gathered once and stays whole until the shards are next edited. With scope
    `global` and gather `node` or `window` the units are sharded inside the node; the master, which the merge
    owns, is sharded further.

    A quantised base is sharded and gathered as bytes; this rank's fp32 parts stand beside them.
    """

    tied_steps = 0

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        blocks: Sequence[nn.Module],
        collectives: Collectives,
        base: BaseConfig,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model, self.device, self.collectives = model, device, collectives
        self.bases = {name: layer.base for name, layer in heads.linears.items()}
        self.group = collectives.world if base.crosses_nodes else collectives.node
        keep = base.gather == "window"
        if self.group.process_group is None:
            raise RuntimeError("engine fsdp needs torch.distributed.init_process_group, even for one process")
        mesh = DeviceMesh.from_group(self.group.process_group, device.type)
        policy = MixedPrecisionPolicy(param_dtype=None if base.quantised else compute_dtype, cast_forward_inputs=False)
        offloaded = base.offload == "cpu" and device.type != "cpu"
        options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if offloaded else {}
        unsharded = set(heads.parameters().values())
        for module in (*blocks, model):
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=not keep,
                ignored_params=unsharded,
                **options,
            )
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_reshard_after_backward(not keep, recurse=False)
            unit.set_custom_all_gather(collectives.counted_all_gather(self.group, "base"))
        home = torch.device("cpu") if offloaded else device
        materialise(model, device, home)
        self.parts: dict[str, Tensor] = {}
        for name, held in self.bases.items() if base.quantised else ():
            start, stop = self.slice_of(name, collectives.topology.rank)
            self.parts[name] = torch.full((stop - start,), math.nan, device=home)
            held.master = partial(self._whole, name)

    def slice_of(self, name: str, rank: int) -> Slice:
        return cut(self.bases[name].shape, self.group.size, rank, rows=True)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """W [O, I] from the fp32 parts of all ranks. Collective."""
        (start, stop), (out, into) = self.slice_of(name, 0), self.bases[name].shape
        part = self.parts[name].to(self.device, dtype)
        padded = F.pad(part, (0, stop - start - part.numel()))
        gathered = self.collectives.all_gather(padded, self.group, "base")
        return gathered.view(-1, into)[:out]

    @contextmanager
    def editable(self) -> Iterator[Mapping[str, Tensor]]:
        for unit in self.units:
            unit.reshard()  # else the next forward would read whole weights gathered before the edit
        held = {name: _local(base.weight) for name, base in self.bases.items()}
        yield self.parts or {name: local.view(-1) for name, local in held.items()}
        for name, part in self.parts.items():
            self.bases[name].renew(held[name], part, self.device)


def _local(weight: nn.Parameter) -> Tensor:
    data = weight.data
    assert isinstance(data, DTensor)
    return data.to_local()
