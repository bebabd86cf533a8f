"""Merging replica parameters: the heads' copies are averaged, in the node or over all nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_scale.collectives import Collectives
from lte_scale.config.schema import MergeConfig
from lte_scale.model import Heads
from lte_scale.outer import Outer


class ReplicaMerger:
    """All replica parameters as one vector per head [H, C]; every rank keeps their whole master (they are small)."""

    def __init__(self, heads: Heads, collectives: Collectives, config: MergeConfig, ema_decay: float) -> None:
        self.heads, self.collectives = heads, collectives
        self.outer = Outer(config, ema_decay)
        self.outer.masters = {
            name: p.detach().view(len(heads.ids), -1)[0].clone() for name, p in heads.replicas.items()
        }
        self.outer.start_average()

    @torch.no_grad()
    def merge(self, everywhere: bool) -> None:
        """Every head continues from the mean of the node's heads, or from the outer step on the mean of all heads."""
        means = self._means(everywhere)
        if everywhere:
            for name, mean in means.items():
                self.outer.update(name, mean - self.outer.masters[name], 0.0)
            means = self.outer.masters
        self.write(means)

    def write(self, values: dict[str, Tensor]) -> None:
        """Give every head of this process these values [C]."""
        for name, parameter in self.heads.replicas.items():
            parameter.detach().view(len(self.heads.ids), -1).copy_(values[name])

    def _means(self, everywhere: bool) -> dict[str, Tensor]:
        c, topology = self.collectives, self.collectives.topology
        flat = torch.cat([p.detach().view(len(self.heads.ids), -1) for p in self.heads.replicas.values()], 1).mean(0)
        size, ranks = flat.numel(), topology.ranks_per_node
        padded = torch.nn.functional.pad(flat, (0, -size % ranks)).view(ranks, -1)
        part = c.reduce_scatter(padded, c.node, "merge_replica") / ranks
        if everywhere:
            part = c.all_reduce(part, c.peers, "merge_replica") / topology.nodes
        flat = c.all_gather(part, c.node, "merge_replica").flatten()[:size]
        sizes = [master.numel() for master in self.outer.masters.values()]
        return dict(zip(self.outer.masters, flat.split(sizes), strict=True))

    @torch.no_grad()
    def swap_in(self, average: bool) -> dict[str, Tensor]:
        """Show the merged values (or their moving average); returns what `swap_out` needs."""
        kept = {name: p.detach().clone() for name, p in self.heads.replicas.items()}
        self.write(self.outer.averages if average else self.outer.masters)
        return kept

    @torch.no_grad()
    def swap_out(self, kept: dict[str, Tensor]) -> None:
        for name, parameter in self.heads.replicas.items():
            parameter.copy_(kept[name])
