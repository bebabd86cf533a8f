"""Where am I: nodes, ranks and heads as plain arithmetic, then the process groups that follow from it.

Ranks are numbered node by node, as torchrun does: rank = node * ranks_per_node + local_rank. Heads likewise:
node n owns the global heads n * heads_per_node ... (n + 1) * heads_per_node - 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whose checks use this module
    from lte_scale.config.schema import FaultToleranceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """The place of one rank among `nodes` x `ranks_per_node` ranks and `nodes` x `heads_per_node` heads.

    Where nodes are jobs of their own (`fault_tolerance`), the ranks are those of one job, and the heads those of all.

    Attributes:
        first_node: the number of this job's first node among all.
        of_nodes: how many nodes the run has in all jobs; 0 means those of this job.
        nodes_per_region: neighbouring nodes that merge among themselves between the merges of all; 0 means none do.

    Raises:
        ValueError: if the heads of a node neither divide its ranks nor are a multiple of them, or regions do not divide
            the nodes.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    heads_per_node: int = 1
    rank: int = 0
    first_node: int = 0
    of_nodes: int = 0
    nodes_per_region: int = 0

    def __post_init__(self) -> None:
        heads, ranks = self.heads_per_node, self.ranks_per_node
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.nodes} x {ranks} ranks")
        if heads < 1 or (ranks % heads and heads % ranks):
            valid = [h for h in range(1, ranks + 1) if ranks % h == 0]
            raise ValueError(
                f"topology.heads_per_node: {heads} heads cannot be placed on {ranks} ranks per node; "
                f"use one of {', '.join(map(str, valid))} or a multiple of {ranks}"
            )

        if self.nodes_per_region and self.nodes % self.nodes_per_region:
            raise ValueError(
                f"topology.nodes_per_region: {self.nodes_per_region} does not divide {self.nodes} nodes; use a divisor "
                "of them, or 0"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    def among(self, jobs: FaultToleranceConfig) -> Topology:
        """The same job in its place, where nodes are jobs of their own."""
        return replace(self, first_node=jobs.node, of_nodes=jobs.nodes) if jobs.enabled else self

    @property
    def all_nodes(self) -> int:
        """Nodes of the whole run."""
        return self.of_nodes or self.nodes

    @property
    def whole(self) -> Topology:
        """The whole run as if it were one job."""
        rank = self.first_node * self.ranks_per_node + self.rank
        return replace(self, nodes=self.all_nodes, rank=rank, first_node=0, of_nodes=0)

    @property
    def heads(self) -> int:
        """Heads in the whole run (N of the paper)."""
        return self.all_nodes * self.heads_per_node

    @property
    def job_heads(self) -> range:
        """Global ids of the heads of this job: all, but where nodes are jobs of their own."""
        first = self.first_node * self.heads_per_node
        return range(first, first + self.nodes * self.heads_per_node)

    @property
    def heads_per_rank(self) -> int:
        """Heads computed as one batched pass in a rank (H in shape names)."""
        return max(1, self.heads_per_node // self.ranks_per_node)

    @property
    def ranks_per_head(self) -> int:
        """Ranks that share a head and average its gradients every step."""
        return max(1, self.ranks_per_node // self.heads_per_node)

    @property
    def first_head(self) -> int:
        """Global id of this rank's first head."""
        local = self.local_rank // self.ranks_per_head * self.heads_per_rank
        return (self.first_node + self.node) * self.heads_per_node + local

    @property
    def head_member(self) -> int:
        """Index of this rank among the ranks that share its head."""
        return self.local_rank % self.ranks_per_head

    @property
    def my_heads(self) -> range:
        """Global ids of this rank's heads."""
        return range(self.first_head, self.first_head + self.heads_per_rank)

    def node_ranks(self, node: int) -> list[int]:
        return list(range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node))

    def peer_ranks(self, local_rank: int) -> list[int]:
        """The ranks with the same local rank on every node: the links a global merge uses."""
        return [node * self.ranks_per_node + local_rank for node in range(self.nodes)]

    @property
    def region_size(self) -> int:
        """Nodes of a region; without regions every node is one of its own."""
        return self.nodes_per_region or 1

    def region_peers(self, node: int, local_rank: int) -> list[int]:
        """The ranks with this local rank in the region of `node`."""
        first = node - node % self.region_size
        return self.peer_ranks(local_rank)[first : first + self.region_size]

    def head_ranks(self, node: int, group: int) -> list[int]:
        """The ranks of the `group`-th set of ranks of a node that share a head."""
        first = node * self.ranks_per_node + group * self.ranks_per_head
        return list(range(first, first + self.ranks_per_head))


def from_environment(
    heads_per_node: int = 0, environ: Mapping[str, str] = os.environ, *, nodes_per_region: int = 0
) -> Topology:
    """The topology of this process from the variables of torchrun or DeepSpeed's launcher; without them a world of one.

    Args:
        heads_per_node: heads in a node; 0 means one per rank.
        nodes_per_region: as `Topology` has it.

    Raises:
        ValueError: if the variables contradict one another, or as `Topology`.
    """
    world, rank = int(environ.get("WORLD_SIZE", "1")), int(environ.get("RANK", "0"))
    deepspeed = "CROSS_SIZE" in environ and "LOCAL_WORLD_SIZE" not in environ
    local = "LOCAL_SIZE" if deepspeed else "LOCAL_WORLD_SIZE"
    ranks_per_node = int(environ.get(local, "1"))
    nodes = int(environ["CROSS_SIZE"]) if deepspeed else world // ranks_per_node
    if world != nodes * ranks_per_node:
        raise ValueError(
            f"WORLD_SIZE={world} is not {nodes} nodes of {local}={ranks_per_node}: "
            "every node must run the same number of ranks"
        )
    return Topology(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        heads_per_node=heads_per_node or ranks_per_node,
        rank=rank,
        nodes_per_region=nodes_per_region,
    )
