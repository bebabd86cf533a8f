"""Who owns what and which bytes move, as arithmetic: what `plan` prints and the byte counters must show.

One `Arrangement` per configuration and topology; every function is of one rank, the links as in `collectives`.
Nothing here needs a process group, a tensor or a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lte_scale.collectives import Scope, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from lte_scale.config.schema import Config
from lte_scale.cost import Layer, Shapes
from lte_scale.exchange import Bucket, Ownership, Path, Slice, choose_path, split_evenly
from lte_scale.topology import Topology

FP32 = 4

Traffic = Counter[tuple[Scope, str]]
"""Bytes sent by (scope, purpose), as `Collectives.bytes_sent` counts them."""


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
        return self.spread and self.config.base.gather != "pass"

    @property
    def folded(self) -> bool:
        """A resetless head's product is subtracted from the base of its node, not in every forward pass."""
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
        coupled = self.config.base.scope == "global" and self.config.base.gather == "pass"
        return self.topology.world_size if coupled else self.topology.ranks_per_node

    @property
    def compute_bytes(self) -> int:
        """Bytes of a gathered value."""
        return 2 if self.config.train.precision == "bf16" else FP32

    def part(self, layer: Layer) -> int:
        """Values of a weight in one shard of the engine; the last shards hold fewer, but send as many."""
        if self.config.engine.name == "deepspeed":  # cuts the flattened weight, FSDP its rows
            return -(-layer.values // self.engine_ranks)
        return -(-layer.out // self.engine_ranks) * layer.into

    def ownership(self, name: str, rank: int) -> Ownership:
        """The parts of weight `name` at global rank `rank`."""
        layer, topology = self.shapes.layers[name], self.topology
        node, local = divmod(rank, topology.ranks_per_node)

        def shard(of: int) -> Slice:
            index, part = of % self.engine_ranks, self.part(layer)
            return min(index * part, layer.values), min((index + 1) * part, layer.values)

        parts: tuple[Slice, ...] = (shard(rank),)
        if self.refined:
            parts = split_evenly(shard(rank), topology.nodes)
        elif self.spread:
            parts = tuple(shard(peer) for peer in topology.peer_ranks(local))
        return Ownership(layer.shape, parts[node] if self.spread else shard(rank), parts, shard(rank))

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
        for layer in self.shapes.layers.values():
            sizes[layer.unit] += self.part(layer) * self.engine_ranks
        return dict(sizes)


def path_bytes(a: Arrangement, layer: Layer) -> dict[Path, int]:
    """Bytes that leave a node in a global merge for one weight, on either path (docs/plan.md), padding aside."""
    nodes = a.topology.nodes
    factor = (nodes - 1) * a.merges_sent * a.topology.heads_per_node * layer.factor_values
    dense = (2 if a.config.base.scope == "node" else 1) * (nodes - 1) * layer.values // nodes
    return {"factor": FP32 * factor, "dense": FP32 * dense}


def length(part: Slice) -> int:
    """Elements of a part."""
    return part[1] - part[0]


class Links:
    """The groups of one rank, and the bytes it sends in them.

    Attributes:
        sent: by (scope, purpose), as `Collectives.bytes_sent`.
    """

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology = replace(topology, rank=rank)
        t, self.sent = self.topology, Traffic()
        self.world, self.node = list(range(t.world_size)), t.node_ranks(t.node)
        self.peers = t.peer_ranks(t.local_rank)
        self.head = t.head_ranks(t.node, t.local_rank // t.ranks_per_head)

    def _send(self, group: Sequence[int], purpose: str, sent: int) -> None:
        t = self.topology
        successor = group[(group.index(t.rank) + 1) % len(group)]
        scope: Scope = "intra_node" if successor // t.ranks_per_node == t.node else "inter_node"
        if sent:
            self.sent[scope, purpose] += sent

    def all_reduce(self, group: Sequence[int], purpose: str, message_bytes: int) -> None:
        self._send(group, purpose, all_reduce_bytes(len(group), message_bytes))

    def reduce_scatter(self, group: Sequence[int], purpose: str, message_bytes: int) -> None:
        self._send(group, purpose, reduce_scatter_bytes(len(group), message_bytes))

    def all_gather(self, group: Sequence[int], purpose: str, part_bytes: int) -> None:
        self._send(group, purpose, all_gather_bytes(len(group), part_bytes))


def gather_traffic(a: Arrangement, rank: int) -> Traffic:
    """Gathering the whole base once."""
    links = Links(a.topology, rank)
    if a.engine_ranks > 1:
        group = links.world if a.engine_ranks == a.topology.world_size else links.node
        for values in a.units().values():
            links.all_gather(group, "base", values // a.engine_ranks * a.compute_bytes)
    return links.sent


def gradient_traffic(a: Arrangement, rank: int) -> Traffic:
    """Averaging the gradients of a head that several ranks share, every step."""
    links = Links(a.topology, rank)
    links.all_reduce(links.head, "head_gradient", FP32 * a.shapes.trainable_values)
    return links.sent


def step_traffic(a: Arrangement, rank: int) -> Traffic:
    """An optimizer step; with `base.gather: window` one whose base is gathered already."""
    passes = 0 if a.config.base.gather == "window" else 2 * a.config.train.accumulate
    return times(gather_traffic(a, rank), passes) + gradient_traffic(a, rank)


def merge_traffic(a: Arrangement, rank: int, *, everywhere: bool) -> Traffic:
    """A merge of the heads of a node, or (`everywhere`) of all nodes; purposes as in `merge` and `replicas`."""
    links, t = Links(a.topology, rank), a.topology
    for bucket in a.buckets:
        part = FP32 * t.heads_per_rank * a.head_part(bucket)
        if everywhere and bucket.path == "factor":
            part *= a.merges_sent
            links.all_gather(links.peers, "merge_factor", part)
            links.all_gather(links.node, "merge_factor", part * t.nodes)
        else:
            links.all_gather(links.node, "merge_factor", part)
        if everywhere and bucket.path == "dense" and a.spread:
            links.reduce_scatter(links.peers, "merge_dense", FP32 * t.nodes * a.padded_parts(bucket, rank))
        elif everywhere and bucket.path == "dense":
            links.all_reduce(links.peers, "merge_dense", FP32 * a.formed(bucket, rank))
        if everywhere and a.refined:
            links.all_gather(links.peers, "merge_refresh", FP32 * a.padded_parts(bucket, rank))
    part = FP32 * -(-a.shapes.replica_values // t.ranks_per_node)
    links.reduce_scatter(links.node, "merge_replica", part * t.ranks_per_node)
    if everywhere:
        links.all_reduce(links.peers, "merge_replica", part)
    links.all_gather(links.node, "merge_replica", part)
    return links.sent


def run_traffic(a: Arrangement, rank: int, steps: int) -> Traffic:
    """The first `steps` optimizer steps of a run with their merges; evaluations and checkpoints are not in it."""
    global_merges = steps // a.config.merge.every
    merges = steps // a.local_every
    sent = times(step_traffic(a, rank), steps)
    if a.config.base.gather == "window":
        sent += times(gather_traffic(a, rank), -(-steps // a.local_every))
    sent += times(merge_traffic(a, rank, everywhere=True), global_merges)
    return sent + times(merge_traffic(a, rank, everywhere=False), merges - global_merges)


def times(traffic: Traffic, count: int) -> Traffic:
    return Traffic({key: sent * count for key, sent in traffic.items()})


def of_node(a: Arrangement, per_rank: Callable[[Arrangement, int], Traffic]) -> Traffic:
    """The sum over the ranks of a node; nodes do not differ."""
    total = Traffic()
    for rank in a.topology.node_ranks(0):
        total += per_rank(a, rank)
    return total
