"""Who owns, forms, computes with and exchanges what, as arithmetic: the merge follows it, `plan` computes with it.

One `Arrangement` per configuration and topology. Values per weight [O, I], rank R, h heads per node, K nodes, G ranks
per node. Nothing here needs a process group or a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lte_scale.config.schema import Config
from lte_scale.cost import Shapes
from lte_scale.engines.base import Slice, cut, split_evenly
from lte_scale.topology import Topology

FP32 = 4
Path = Literal["factor", "dense"]


@dataclass(frozen=True, slots=True)
class Ownership:
    """Parts of one weight, as slices of the row-major flattened [O, I] matrix.

    Attributes:
        own: the part of the master this rank keeps and updates.
        parts: the parts whose change this rank forms for a dense exchange: `own` alone if every node has the whole
            weight (an all-reduce over the peers), else one per peer (a reduce-scatter).
        compute: the part the engine keeps for computing.
    """

    shape: tuple[int, int]
    own: Slice
    parts: tuple[Slice, ...]
    compute: Slice

    @property
    def part_size(self) -> int:
        """Elements of the largest part: what the others are padded to."""
        return max(stop - start for start, stop in self.parts)


def choose_path(
    shape: tuple[int, int], rank: int, topology: Topology, *, scope: str, merges_per_window: int, asked: str
) -> Path:
    """The path that sends fewer bytes between nodes for one weight, or the one asked for.

    Per node and merge the factor path sends (K - 1) * merges * h * R * (in + out) values, the dense path
    2 (K - 1) / K * in * out with scope `node` and half of that with scope `global`.
    """
    if asked != "auto":
        return "factor" if asked == "factor" else "dense"
    out, into = shape
    nodes = topology.nodes
    factor = (nodes - 1) * merges_per_window * topology.heads_per_node * rank * (into + out)
    dense = (2 if scope == "node" else 1) * (nodes - 1) / nodes * into * out
    return "factor" if factor < dense else "dense"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Weights on one path that travel as one message."""

    path: Path
    names: tuple[str, ...]


def length(part: Slice) -> int:
    """Elements of a part."""
    return part[1] - part[0]


@dataclass(frozen=True)
class Arrangement:
    """Who owns, forms, computes with and exchanges what."""

    shapes: Shapes
    topology: Topology
    config: Config

    @property
    def local_every(self) -> int:
        return self.config.merge.local_every or self.config.merge.every

    @property
    def two_level(self) -> bool:
        return self.local_every < self.config.merge.every

    @property
    def resetless(self) -> bool:
        return self.config.adapters.mode == "resetless"

    @property
    def spread(self) -> bool:
        """The master is cut over all nodes."""
        return self.config.base.scope == "global" and self.topology.nodes > 1

    @property
    def refined(self) -> bool:
        """Each node has a compute copy of a master that is cut finer."""
        return self.spread and not self.config.base.crosses_nodes

    @property
    def folded(self) -> bool:
        """A node's base belongs to one resetless head, so that it holds W - s B' A': no subtracting in every pass."""
        return self.resetless and self.topology.heads_per_node == 1 and (not self.spread or self.refined)

    @property
    def separate(self) -> bool:
        """The master is another tensor than the engine's shards."""
        return self.two_level or self.folded or self.refined

    @property
    def merges_sent(self) -> int:
        """Sets of factors that a global merge on the factor path sends: one per merge of the window (reset)."""
        return 1 if self.resetless else self.config.merge.every // self.local_every

    @property
    def engine_ranks(self) -> int:
        """Ranks that the engine shards the base over."""
        if self.config.engine.name == "none":
            return 1
        return self.topology.world_size if self.config.base.crosses_nodes else self.topology.ranks_per_node

    @property
    def compute_bytes(self) -> int:
        """Bytes of a gathered value."""
        return 2 if self.config.train.bf16 else FP32

    def shard(self, name: str, rank: int) -> Slice:
        """The part of weight `name` that the engine stores at global rank `rank`."""
        rows = self.config.engine.name != "deepspeed"
        return cut(self.shapes.layers[name].shape, self.engine_ranks, rank, rows=rows)

    def part(self, name: str) -> int:
        """Values of a weight in one shard of the engine; the last shards hold fewer, but send as many."""
        return length(self.shard(name, 0))

    def ownership(self, name: str, rank: int, stored: Callable[[str, int], Slice] | None = None) -> Ownership:
        """The parts of weight `name` at global rank `rank`; `stored` is `shard`, or the engine's own word for it."""
        stored = stored or self.shard
        topology, compute = self.topology, stored(name, rank)
        node, local = divmod(rank, topology.ranks_per_node)
        parts: tuple[Slice, ...] = (compute,)
        if self.refined:
            parts = split_evenly(compute, topology.nodes)
        elif self.spread:
            parts = tuple(stored(name, peer) for peer in topology.peer_ranks(local))
        own = parts[node] if self.spread else compute
        return Ownership(self.shapes.layers[name].shape, own, parts, compute)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The path of every weight between nodes."""
        return {
            name: choose_path(
                layer.shape,
                layer.rank,
                self.topology,
                scope=self.config.base.scope,
                merges_per_window=self.merges_sent,
                asked=self.config.merge.path,
            )
            for name, layer in self.shapes.layers.items()
        }

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The messages of a merge: weights of one path up to `merge.bucket_mb`, the same on every rank."""
        found: list[Bucket] = []
        limit, room = self.config.merge.bucket_mb * 1e6, 0.0
        for name, path in sorted(self.paths.items(), key=lambda item: item[1]):
            size = self._message_bytes(name)
            if not found or found[-1].path != path or size > room:
                found.append(Bucket(path, (name,)))
                room = limit - size
            else:
                found[-1] = Bucket(path, (*found[-1].names, name))
                room -= size
        return found

    def _message_bytes(self, name: str) -> int:
        layer = self.shapes.layers[name]
        factors = layer.factor_values * self.topology.heads_per_node
        if self.paths[name] == "factor":
            factors *= self.topology.nodes * self.merges_sent
        # Of the whole weight, not of this rank's rows: all ranks must form the same buckets.
        return FP32 * max(factors, layer.values // self.topology.ranks_per_node)

    def head_part(self, bucket: Bucket) -> int:
        """Values of one head that one of the ranks sharing it sends."""
        size = sum(self.shapes.layers[name].factor_values for name in bucket.names)
        return -(-size // self.topology.ranks_per_head)

    def formed(self, bucket: Bucket, rank: int) -> int:
        """Values of a bucket's products that `rank` forms for a dense exchange."""
        return sum(length(part) for name in bucket.names for part in self.ownership(name, rank).parts)

    def padded_parts(self, bucket: Bucket, rank: int) -> int:
        return sum(self.ownership(name, rank).part_size for name in bucket.names)

    def units(self) -> dict[str, int]:
        """Values of each gathered unit, padding included; the empty name is what lies outside of the blocks."""
        sizes: Counter[str] = Counter()
        for name, layer in self.shapes.layers.items():
            sizes[layer.unit] += self.part(name) * self.engine_ranks
        return dict(sizes)
