"""Bringing masters to what a node computes with, also where they are cut finer than the engine's shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, Ownership, length
from lte_scale.codec import Codec
from lte_scale.collectives import Collectives
from lte_scale.engines.base import cut_from


class Copies:
    """Brings masters to the engine's shards of every node: those of one rank as they are, finer ones from its peers."""

    def __init__(
        self,
        arrangement: Arrangement,
        collectives: Collectives,
        ownership: Mapping[str, Ownership],
        device: torch.device,
    ) -> None:
        """`device`: where messages are formed."""
        self.arrangement, self.collectives, self.ownership, self.device = arrangement, collectives, ownership, device

    def publish(self, bucket: Bucket, source: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Write `source`, own parts of every rank, to the shards."""
        if self.arrangement.refined:
            for name, values in self._of_peers(bucket, source, Codec()).items():
                shards[name].copy_(values)
            return
        for name in bucket.names:
            if shards[name].data_ptr() != source[name].data_ptr():
                shards[name].copy_(source[name])

    def follow(self, bucket: Bucket, masters: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Move every node's copy towards the masters; it lags behind by what messages miss, on all nodes alike."""
        moved = {}
        for name in bucket.names:
            own = self.ownership[name]
            moved[name] = masters[name] - cut_from(shards[name], own.compute, own.own)
        for name, change in self._of_peers(bucket, moved, self.arrangement.codec).items():
            shards[name].add_(change.to(shards[name].device))

    def _of_peers(self, bucket: Bucket, own: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
        """`own` parts of all peers, as all of them decode it, joined to what this rank computes with."""
        sizes = {name: self.ownership[name].part_size for name in bucket.names}
        padded = [F.pad(own[name], (0, size - own[name].numel())) for name, size in sizes.items()]
        message = codec.encode(torch.cat(padded).to(self.device))
        gathered = self.collectives.all_gather(message, self.collectives.peers, "merge_refresh")
        found = {}
        decoded = codec.decode(gathered, sum(sizes.values())).split(list(sizes.values()), 1)
        for name, rows in zip(sizes, decoded, strict=True):
            lengths = [length(part) for part in self.ownership[name].parts]
            found[name] = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
        return found
