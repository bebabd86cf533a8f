"""FSDP2: every block is one unit; factors and replica parameters stay whole and local."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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
        self.model, self.heads = model, heads
        self.group = collectives.world if base.crosses_nodes else collectives.node
        keep = base.gather == "window"
        if self.group.process_group is None:
            raise RuntimeError("engine fsdp needs torch.distributed.init_process_group, even for one process")
        mesh = DeviceMesh.from_group(self.group.process_group, device.type)
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=False)
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
        materialise(model, device, torch.device("cpu") if offloaded else device)

    def slice_of(self, name: str, rank: int) -> Slice:
        layer = self.heads.linears[name]
        return cut((layer.B.shape[1], layer.A.shape[2]), self.group.size, rank, rows=True)

    @contextmanager
    def editable(self) -> Iterator[Mapping[str, Tensor]]:
        for unit in self.units:
            unit.reshard()  # else the next forward would read whole weights gathered before the edit
        yield {name: _local(layer.base.weight).view(-1) for name, layer in self.heads.linears.items()}


def _local(weight: nn.Parameter) -> Tensor:
    data = weight.data
    assert isinstance(data, DTensor)
    return data.to_local()
