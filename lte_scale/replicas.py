"""Merging replica parameters: the heads' copies are averaged, in the node or over all nodes."""

from __future__ import annotations

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
        self,
        heads: Heads,
        collectives: Collectives,
        config: MergeConfig,
        ema_decay: float,
        codec: Codec,
        link: Collectives,
    ) -> None:
        """`link`: the collectives between nodes."""
        self.heads, self.collectives, self.link = heads, collectives, link
        self.outer = Outer(config, ema_decay)
        self.outer.masters = {
            name: p.detach().view(len(heads.ids), -1)[0].clone() for name, p in heads.replicas.items()
        }
        self.outer.start_average()
        self._left: Tensor | None = None
        self.feedback: MeanWithFeedback | None = None
        if not codec.exact:
            topology, masters = collectives.topology, self.outer.masters.values()
            part = -(-sum(master.numel() for master in masters) // topology.ranks_per_node)
            device = next(iter(masters)).device
            self.feedback = MeanWithFeedback(
                codec, link, link.peers, "merge_replica", -(-part // topology.nodes), shared=True, device=device
            )

    @torch.no_grad()
    def merge(self) -> None:
        """Every head continues from the outer step on the mean of all heads."""
        self.take(self.over_link(self.part_of_node()))

    @torch.no_grad()
    def merge_locally(self, *, regional: bool) -> None:
        """Every head continues from the mean of the heads of the node, or of the region."""
        part, region = self.part_of_node(), self.collectives.region
        if regional:
            part = self.collectives.all_reduce(part, region, "merge_region") / region.size
        self.write(self._named(self._gathered(part)))

    @torch.no_grad()
    def take(self, mean: Tensor) -> None:
        """Every head continues from the outer step on the mean of all heads, of which this is this rank's part [c]."""
        self._update(mean)
        self.write(self.outer.masters)

    @torch.no_grad()
    def depart(self) -> Tensor:
        """Every head continues from the mean of the node's heads; what `over_link` takes."""
        part = self.part_of_node()
        self._left = self._gathered(part)
        self.write(self._named(self._left))
        return part

    @torch.no_grad()
    def land(self, mean: Tensor) -> None:
        """Every head continues from where it is, moved by what the master has come to differ from the node's mean."""
        assert self._left is not None
        self._update(mean)
        for name, left in self._named(self._left).items():
            of_heads = self.heads.replicas[name].detach().view(len(self.heads.ids), -1)
            of_heads.add_(self.outer.masters[name] - left)
        self._left = None

    @torch.no_grad()
    def start_again(self, index: int) -> None:
        """The head at `index` continues from the master; while a merge is under way, from what that will move to it."""
        values = self.outer.masters if self._left is None else self._named(self._left)
        for name, parameter in self.heads.replicas.items():
            parameter.detach().view(len(self.heads.ids), -1)[index].copy_(values[name].flatten())

    def over_link(self, part: Tensor) -> Tensor:
        """The mean over the nodes of this rank's part: of values in fp32, else of their change since the last merge."""
        if self.feedback is None:
            return self.link.all_reduce(part.clone(), self.link.peers, "merge_replica") / self.link.topology.nodes
        nodes = self.link.topology.nodes
        change = part - self._parts(torch.cat(list(self.outer.masters.values())))[self.link.topology.local_rank]
        rows = F.pad(change, (0, -change.numel() % nodes)).view(nodes, -1)
        return self.feedback.mean(rows).flatten()[: change.numel()]

    def _update(self, mean: Tensor) -> None:
        for name, value in self._named(self._gathered(mean)).items():
            change = value if self.feedback is not None else value - self.outer.masters[name]
            self.outer.update(name, change, 0.0)

    def write(self, values: dict[str, Tensor]) -> None:
        """Give every head of this process these values [C]."""
        for name, parameter in self.heads.replicas.items():
            parameter.detach().view(len(self.heads.ids), -1).copy_(values[name])

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [master.numel() for master in self.outer.masters.values()]
        return dict(zip(self.outer.masters, flat.split(sizes), strict=True))

    def _parts(self, flat: Tensor) -> Tensor:
        """[C] as a part for every rank of the node [G, c]."""
        ranks = self.collectives.topology.ranks_per_node
        return F.pad(flat, (0, -flat.numel() % ranks)).view(ranks, -1)

    def part_of_node(self) -> Tensor:
        """This rank's part of the mean over the node's heads [c]."""
        c = self.collectives
        flat = torch.cat([p.detach().view(len(self.heads.ids), -1) for p in self.heads.replicas.values()], 1).mean(0)
        return c.reduce_scatter(self._parts(flat), c.node, "merge_replica") / c.topology.ranks_per_node

    def _gathered(self, part: Tensor) -> Tensor:
        """The parts of all ranks of the node [C]."""
        values = sum(master.numel() for master in self.outer.masters.values())
        return self.collectives.all_gather(part, self.collectives.node, "merge_replica").flatten()[:values]

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
