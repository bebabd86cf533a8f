"""A part of a flat tensor that torch.distributed.checkpoint saves and loads, whatever part each rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatPart(Tensor):
    """Elements [start, start + len(part)) of a flat tensor of `total` elements, which is its size.

    Ranks may hold any parts: unequal, empty, or the same ones, which are then written once. DCP's own sharded types
    want equal chunks along a dimension of the tensor, which flat partitions of a matrix are not. Implements DCP's
    checkpointable protocol (torch/distributed/_checkpointable.py), which is for tensor types: it holds no data besides
    `part`, and computes nothing.
    """

    part: Tensor
    start: int

    @staticmethod
    def __new__(cls, values: Tensor, start: int, total: int) -> FlatPart:
        made = Tensor._make_wrapper_subclass(cls, (total,), dtype=values.dtype, device=values.device)  # type: ignore[attr-defined]
        made.part, made.start = values, start
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise TypeError(f"a FlatPart is for checkpoints, not for {function}")

    def copied(self) -> FlatPart:
        """The same part with a copy of its values on the CPU."""
        return FlatPart(self.part.detach().to("cpu", copy=True), self.start, self.numel())

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        index = MetadataIndex(name, torch.Size([self.start]))
        return [
            WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.size()))
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        size = self.part.numel()
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([size]))] if size else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.part
