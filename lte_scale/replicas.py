"""Merging replica parameters: the heads' copies are averaged, in the node or over all nodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.codec import Codec
from lte_scale.collectives import Collectives
from lte_scale.config.schema import MergeConfig
from lte_scale.feedback import MeanWithFeedback
from lte_scale.model import Heads
from lte_scale.outer import Outer


class ReplicaMerger:
    """All replica parameters as one vector per head [H, C]; every rank keeps their whole master (they are small).

    Attributes:
        feedback: what messages between nodes have missed so far, on this rank's part; none in fp32.
    """

    def __init__(
        self, heads: Heads, collectives: Collectives, config: MergeConfig, ema_decay: float, codec: Codec
    ) -> None:
        self.heads, self.collectives = heads, collectives
        self.outer = Outer(config, ema_decay)
        self.outer.masters = {
            name: p.detach().view(len(heads.ids), -1)[0].clone() for name, p in heads.replicas.items()
        }
        self.outer.start_average()
        self.feedback: MeanWithFeedback | None = None
        if not codec.exact:
            topology, masters = collectives.topology, self.outer.masters.values()
            part = -(-sum(master.numel() for master in masters) // topology.ranks_per_node)
            device = next(iter(masters)).device
            self.feedback = MeanWithFeedback(
                codec, collectives, "merge_replica", -(-part // topology.nodes), shared=True, device=device
            )

    @torch.no_grad()
    def merge(self, everywhere: bool) -> None:
        """Every head continues from the mean of the node's heads, or from the outer step on the mean of all heads."""
        flat = torch.cat([p.detach().view(len(self.heads.ids), -1) for p in self.heads.replicas.values()], 1).mean(0)
        if not everywhere:
            self.write(self._named(self._mean(flat)))
            return
        if self.feedback is None:
            means = self._named(self._mean(flat, self._mean_over_nodes))
            changes = {name: mean - self.outer.masters[name] for name, mean in means.items()}
        else:  # what is rounded, and kept for later, is the change
            masters = torch.cat(list(self.outer.masters.values()))
            changes = self._named(self._mean(flat - masters, self._mean_with_feedback))
        for name, change in changes.items():
            self.outer.update(name, change, 0.0)
        self.write(self.outer.masters)

    def write(self, values: dict[str, Tensor]) -> None:
        """Give every head of this process these values [C]."""
        for name, parameter in self.heads.replicas.items():
            parameter.detach().view(len(self.heads.ids), -1).copy_(values[name])

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [master.numel() for master in self.outer.masters.values()]
        return dict(zip(self.outer.masters, flat.split(sizes), strict=True))

    def _mean(self, flat: Tensor, over_nodes: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
        """Over the ranks of the node; each takes its part of the mean further, `over_nodes`."""
        c, ranks = self.collectives, self.collectives.topology.ranks_per_node
        padded = F.pad(flat, (0, -flat.numel() % ranks)).view(ranks, -1)
        part = over_nodes(c.reduce_scatter(padded, c.node, "merge_replica") / ranks)
        return c.all_gather(part, c.node, "merge_replica").flatten()[: flat.numel()]

    def _mean_over_nodes(self, part: Tensor) -> Tensor:
        c = self.collectives
        return c.all_reduce(part, c.peers, "merge_replica") / c.topology.nodes

    def _mean_with_feedback(self, part: Tensor) -> Tensor:
        assert self.feedback is not None
        nodes = self.collectives.topology.nodes
        rows = F.pad(part, (0, -part.numel() % nodes)).view(nodes, -1)
        return self.feedback.mean(rows).flatten()[: part.numel()]

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
