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

from lte_scale.cadence import Cadence
from lte_scale.codec import Codec
from lte_scale.config.schema import Config
from lte_scale.cost import Layer, Shapes
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


@dataclass(frozen=True, slots=True)
class Bucket:
    """Weights of one fragment on one path that travel as one message."""

    path: Path
    names: tuple[str, ...]
    fragment: int = 0


def length(part: Slice) -> int:
    """Elements of a part."""
    return part[1] - part[0]


@dataclass(frozen=True)
class Arrangement:
    """Who owns, forms, computes with and exchanges what."""

    shapes: Shapes
    topology: Topology
    config: Config

    @cached_property
    def cadence(self) -> Cadence:
        return self.config.merge.cadence

    @property
    def local_every(self) -> int:
        return self.cadence.local_every

    @property
    def two_level(self) -> bool:
        return self.cadence.two_level

    @property
    def roaming(self) -> bool:
        """A node's weights move on their own between global merges, or while one is under way."""
        return self.two_level or self.cadence.delay > 0

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
        """A node's base belongs to one resetless head, so that it holds W - s B' A': no subtracting in every pass.

        Not where copies follow the master by its changes (`followed`): those need the bits of what was published.
        """
        own = not self.spread or (self.refined and not self.followed)
        return self.resetless and self.topology.heads_per_node == 1 and own

    @property
    def codec(self) -> Codec:
        """What a merge makes of values that cross between nodes."""
        return Codec(self.config.merge.precision if self.topology.nodes > 1 else "fp32")

    @property
    def factor_codecs(self) -> tuple[Codec, Codec]:
        """The same for A and for B on the factor path (why A has 8 bits at least under reset: `merge`)."""
        few = self.codec.precision == "int4" and not self.resetless
        return (Codec("int8") if few else self.codec), self.codec

    @property
    def region_codec(self) -> Codec:
        """What a merge inside a region makes of values that cross between its nodes."""
        return Codec(self.config.merge.region_precision)

    @property
    def followed(self) -> bool:
        """The nodes' copies are told changes of the master, in fewer bits, and lag behind it by what is missing."""
        return self.refined and not self.codec.exact

    @property
    def separate(self) -> bool:
        """The master is another tensor than the engine's shards."""
        return self.roaming or self.folded or self.refined

    @property
    def merges_sent(self) -> int:
        """Sets of factors that a global merge on the factor path sends: one per merge of the window (reset)."""
        return 1 if self.resetless else self.cadence.every // self.local_every

    @property
    def engine_ranks(self) -> int:
        """Ranks that the engine shards the base over."""
        if self.config.engine.name == "none":
            return 1
        return self.topology.world_size if self.config.base.crosses_nodes else self.topology.ranks_per_node

    @property
    def held(self) -> Codec:
        """How the weights that products read are held and gathered, row by row."""
        base = self.config.base
        return Codec(base.precision if base.quantised else "bf16" if self.config.train.bf16 else "fp32")

    def shard(self, name: str, rank: int) -> Slice:
        """The part of weight `name` that the engine stores at global rank `rank`."""
        rows = self.config.engine.name != "deepspeed"
        return cut(self.shapes.layers[name].shape, self.engine_ranks, rank, rows=rows)

    def part(self, name: str) -> int:
        """Values of a weight in one shard of the engine; the last shards hold fewer, but send as many."""
        return length(self.shard(name, 0))

    def part_bytes(self, name: str) -> int:
        """Bytes of the same as gathered."""
        rows, rest = divmod(self.part(name), self.shapes.layers[name].into)  # a rest with flat shards alone
        return rows * self.held.size(self.shapes.layers[name].into) + self.held.size(rest)

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

    def exchanged(self, own: Ownership, *, regional: bool = False) -> tuple[Slice, ...]:
        """The parts of a weight that peers reduce for one another, one each."""
        if self.spread and not regional:
            return own.parts
        return split_evenly(own.own, self.topology.region_size if regional else self.topology.nodes)

    def path_bytes(self, layer: Layer) -> dict[Path, int]:
        """Bytes that leave a node in a global merge for one weight, on either path (docs/plan.md), padding aside."""
        nodes = self.topology.nodes
        of_head = sum(codec.size(n) for codec, n in zip(self.factor_codecs, layer.factor_sizes, strict=True))
        factor = (nodes - 1) * self.merges_sent * self.topology.heads_per_node * of_head
        dense = (1 if self.spread else 2) * (nodes - 1) * self.codec.size(layer.values) // nodes
        return {"factor": factor, "dense": dense}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The path of every weight between nodes: what is asked for, or what sends fewer bytes."""
        return {name: self._path(layer) for name, layer in self.shapes.layers.items()}

    def _path(self, layer: Layer) -> Path:
        asked = self.config.merge.path
        if self.config.fault_tolerance.enabled:  # nodes come and go: there is one sum over those that are there
            return "dense"
        if asked != "auto":
            return "factor" if asked == "factor" else "dense"
        sent = self.path_bytes(layer)
        return "factor" if sent["factor"] < sent["dense"] else "dense"

    @cached_property
    def fragment_of(self) -> dict[str, int]:
        """The fragment of every weight: runs of layers, in the model's order, with about as many values each."""
        total, before, found = sum(layer.values for layer in self.shapes.layers.values()), 0, {}
        for name, layer in self.shapes.layers.items():
            found[name] = int((before + layer.values / 2) / total * self.cadence.fragments)
            before += layer.values
        return found

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The messages of a merge: weights of one fragment and path up to `merge.bucket_mb`, the same on every rank."""
        found: list[Bucket] = []
        limit, room = self.config.merge.bucket_mb * 1e6, 0.0
        for name, path in sorted(self.paths.items(), key=lambda item: (self.fragment_of[item[0]], item[1])):
            size, fragment = self._message_bytes(name), self.fragment_of[name]
            if not found or (found[-1].fragment, found[-1].path) != (fragment, path) or size > room:
                found.append(Bucket(path, (name,), fragment))
                room = limit - size
            else:
                found[-1] = Bucket(path, (*found[-1].names, name), fragment)
                room -= size
        return found

    def _message_bytes(self, name: str) -> int:
        layer = self.shapes.layers[name]
        factors = layer.factor_values * self.topology.heads_per_node
        if self.paths[name] == "factor":
            factors *= self.topology.nodes * self.merges_sent
        # Of the whole weight, not of this rank's rows: all ranks must form the same buckets.
        return FP32 * max(factors, layer.values // self.topology.ranks_per_node)

    def head_parts(self, bucket: Bucket) -> tuple[int, int]:
        """Values of A and of B of one head that one of the ranks sharing it sends."""
        A, B = map(sum, zip(*(self.shapes.layers[name].factor_sizes for name in bucket.names), strict=True))
        return -(-A // self.topology.ranks_per_head), -(-B // self.topology.ranks_per_head)

    def formed(self, bucket: Bucket, rank: int) -> int:
        """Values of a bucket's products that `rank` forms for a dense exchange."""
        return sum(length(part) for name in bucket.names for part in self.ownership(name, rank).parts)

    def padded_parts(self, bucket: Bucket, rank: int, *, regional: bool = False) -> int:
        """Values of a row of what the peers reduce for one another."""
        parts = (self.exchanged(self.ownership(name, rank), regional=regional) for name in bucket.names)
        return sum(max(map(length, each)) for each in parts)

    @property
    def replica_part(self) -> int:
        """Replica values that one rank of a node takes further; the last one's are padded to as many."""
        return -(-self.shapes.replica_values // self.topology.ranks_per_node)

    def units(self) -> dict[str, int]:
        """Bytes of each gathered unit, padding included; the empty name is what lies outside of the blocks."""
        sizes: Counter[str] = Counter()
        for name, layer in self.shapes.layers.items():
            sizes[layer.unit] += self.part_bytes(name) * self.engine_ranks
        return dict(sizes)
