"""The dense path: the mean over nodes of the change of every weight, each rank reducing the rows it forms.

Over all nodes it is one of two paths; over those of a region it is the way of every weight, whatever its path.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, Ownership, length
from lte_scale.collectives import Collectives
from lte_scale.feedback import MeanWithFeedback


class DenseExchange:
    """Reduces the changes of a bucket over the peers, or (`regional`) over those of this region.

    Attributes:
        feedback: what the messages of a bucket have missed so far; empty in fp32.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        collectives: Collectives,
        ownership: Mapping[str, Ownership],
        device: torch.device,
        *,
        regional: bool = False,
    ) -> None:
        self.collectives, self.spread = collectives, arrangement.spread
        self.peers = collectives.region if regional else collectives.peers
        self.codec = arrangement.region_codec if regional else arrangement.codec
        self.purpose = "merge_region" if regional else "merge_dense"
        self.parts = {name: arrangement.exchanged(own, regional=regional) for name, own in ownership.items()}
        self.feedback: dict[Bucket, MeanWithFeedback] = {}
        for bucket in arrangement.buckets if not self.codec.exact else ():
            if regional or bucket.path == "dense":
                size = sum(map(self._width, bucket.names))
                self.feedback[bucket] = MeanWithFeedback(
                    self.codec, collectives, self.peers, self.purpose, size, shared=not self.spread, device=device
                )

    def mean(self, bucket: Bucket, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the nodes' changes [elements formed] on the part this rank owns."""
        return self.own_parts(bucket, self.reduce(bucket, changes))

    def reduce(self, bucket: Bucket, changes: Mapping[str, Tensor]) -> Tensor:
        """The same as it arrives: what crosses the link, and nothing else."""
        nodes = self.peers.size
        if self.codec.exact and not self.spread:
            return self.collectives.all_reduce(joined(list(changes.values())), self.peers, self.purpose) / nodes
        rows = torch.cat([self._rows(name, change) for name, change in changes.items()], 1)
        if self.codec.exact:
            return self.collectives.reduce_scatter(rows, self.peers, self.purpose) / nodes
        return self.feedback[bucket].mean(rows)

    def own_parts(self, bucket: Bucket, mean: Tensor) -> dict[str, Tensor]:
        """What has arrived, by weight."""
        if self.codec.exact and not self.spread:
            sizes = [sum(map(length, self.parts[name])) for name in bucket.names]
            return dict(zip(bucket.names, mean.split(sizes), strict=True))
        own = mean.split([self._width(name) for name in bucket.names], -1)
        if not self.spread:
            return {name: self._whole(name, part) for name, part in zip(bucket.names, own, strict=True)}
        node = self.collectives.topology.node
        return {name: part[: length(self.parts[name][node])] for name, part in zip(bucket.names, own, strict=True)}

    def _width(self, name: str) -> int:
        return max(map(length, self.parts[name]))

    def _rows(self, name: str, change: Tensor) -> Tensor:
        """The parts of one weight as rows of equal length [K, c]."""
        rows = change.new_zeros(len(self.parts[name]), self._width(name))
        for row, part in zip(rows, change.split([length(p) for p in self.parts[name]]), strict=True):
            row[: part.numel()] = part
        return rows

    def _whole(self, name: str, rows: Tensor) -> Tensor:
        return joined([row[: length(part)] for row, part in zip(rows, self.parts[name], strict=True)])

    def unsent(self) -> dict[str, Tensor]:
        """What the messages of every weight have missed so far, as `LAYER/sent` and `LAYER/shared`: views."""
        found = {}
        for bucket, feedback in self.feedback.items():
            widths = [self._width(name) for name in bucket.names]
            for name, part in zip(bucket.names, feedback.unsent.split(widths, 1), strict=True):
                found[f"{name}/sent"] = part
            if feedback.shared:
                for name, part in zip(bucket.names, feedback.unshared.split(widths), strict=True):
                    found[f"{name}/shared"] = part
        return found


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
