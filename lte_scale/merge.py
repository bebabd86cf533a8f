"""The merge: heads into the base, inside a node every `local_every` steps, between nodes every `every` steps.

    W <- W + (s / N) sum_n B_n A_n                        reset      (arXiv 2402.16828, equation of section 3)
    W <- W + (s / N) sum_n (B_n A_n - B'_n A'_n)          resetless

Every rank forms and keeps its own part of every weight, and writes it through `engine.editable()`. Vocabulary:

    master    the weight at the last global merge, fp32; this rank owns a part of it
    compute   what the engine gathers for the forward pass; the master itself (no second copy) unless the node has
              moved since (local merges), a finer part is owned (scope `global` with a copy per node), or a
              resetless head's product is folded into its own base
    product   (s / h) sum B A of the node's heads, or (s / N) of all heads, at the last merge (resetless alone)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, length
from lte_scale.collectives import Collectives
from lte_scale.engines.base import Engine, Slice
from lte_scale.exchange import FactorExchange, product
from lte_scale.model import Heads
from lte_scale.outer import Outer
from lte_scale.replicas import ReplicaMerger
from lte_scale.timing import Stopwatch

Shards = Mapping[str, Tensor]


class Merger:
    """Merges the heads of a model into its base.

    Attributes:
        ownership: which part of every weight this rank owns, forms and computes with.
        paths: the path of every weight.
        outer: master (own parts), momentum and moving average.
        replicas: the same for replica parameters.
        clock: time in merges, by scope (local or global) and path (factor, dense, replica), a merge being a lap.
    """

    def __init__(self, heads: Heads, engine: Engine, collectives: Collectives, arrangement: Arrangement) -> None:
        self.heads, self.engine, self.collectives, self.arrangement = heads, engine, collectives, arrangement
        self.topology, self.config = arrangement.topology, arrangement.config.merge
        ema_decay = arrangement.config.train.ema_decay
        self.exchange = FactorExchange(heads, collectives)
        self.clock: Stopwatch[tuple[str, str]] = Stopwatch(self.exchange.device)
        self.ownership = {
            name: arrangement.ownership(name, self.topology.rank, engine.slice_of) for name in heads.linears
        }
        self.paths, self.buckets = arrangement.paths, arrangement.buckets
        self.history: dict[Bucket, list[Tensor]] = {bucket: [] for bucket in self.buckets}
        self.node_product: dict[str, Tensor] = {}
        self.mean_product: dict[str, Tensor] = {}
        self.outer = Outer(self.config, ema_decay)
        with self.editable() as shards:
            if self.arrangement.separate:
                for name, own in self.ownership.items():
                    self.outer.masters[name] = _cut(shards[name], own.compute, own.own).clone()
            self.outer.start_average()
        self.replicas = ReplicaMerger(heads, collectives, self.config, ema_decay)
        self._clear_products()

    @contextmanager
    def editable(self) -> Iterator[Shards]:
        """The engine's parts of all weights; within, `outer.masters` are what they are even where they alias them."""
        exact = torch.autocast(self.exchange.device.type, enabled=False)  # a loop may call this under its own autocast
        with torch.no_grad(), exact, self.engine.editable() as shards:
            if not self.arrangement.separate:
                self.outer.masters.update(shards)
            yield shards

    def _rank(self, name: str) -> int:
        return self.heads.linears[name].A.shape[1]

    def _scale(self, name: str) -> float:
        return self.heads.linears[name].scale

    def due(self, step: int) -> bool:
        """Whether heads are merged after `step`, inside the node or between nodes."""
        return step % self.arrangement.local_every == 0

    def is_global(self, step: int) -> bool:
        """Whether the merge after `step` is one between nodes."""
        return step % self.config.every == 0

    @torch.no_grad()
    def merge(self, step: int, *, decay: float = 0.0) -> None:
        """Merge after `step`, in all ranks. `decay`: the fraction the master loses (decoupled weight decay)."""
        everywhere = self.is_global(step)
        scope = "global" if everywhere else "local"
        with self.editable() as shards:
            for bucket in self.buckets:
                with self.clock((scope, bucket.path)):
                    if everywhere:
                        self._merge_globally(bucket, shards, decay)
                    else:
                        self._merge_locally(bucket, shards)
        with self.clock((scope, "replica")):
            self.replicas.merge(everywhere)
        self.clock.lap()
        for layer in self.heads.linears.values():
            if layer.A_prev is None or layer.B_prev is None:
                layer.B.zero_()
            else:
                layer.A_prev.copy_(layer.A)
                layer.B_prev.copy_(layer.B)

    def _merge_locally(self, bucket: Bucket, shards: Shards) -> None:
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor" and not self.arrangement.resetless:
            self.history[bucket].append(packed.clone())  # else a view keeps the factors of all members alive
        for name, change in self._node_changes(bucket, packed).items():
            if not self.arrangement.folded:  # a folded base holds W - s B' A', which a local merge leaves as it is
                shards[name].add_(change.to(shards[name].device))

    def _merge_globally(self, bucket: Bucket, shards: Shards, decay: float) -> None:
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor":
            changes = self._mean_by_factors(bucket, packed)
        else:
            changes = self._mean_by_products(bucket, packed, shards)
        for name, change in changes.items():
            self.outer.update(name, change, decay)
        self._publish(bucket, self.outer.masters, shards)

    def _node_changes(self, bucket: Bucket, packed: Tensor) -> dict[str, Tensor]:
        """What the node's heads have learned since the last merge, on the parts this rank forms [elements]."""
        gathered = self.exchange.within_node(packed.unsqueeze(0), self.exchange.size(bucket.names))
        return self._changes(bucket, gathered, self.node_product, whole=True)

    def _changes(
        self, bucket: Bucket, factors: Tensor, previous: MutableMapping[str, Tensor], *, whole: bool
    ) -> dict[str, Tensor]:
        """The mean over `factors` [..., heads, C] of each weight's product, less `previous`, which it replaces."""
        changes: dict[str, Tensor] = {}
        heads = self.topology.heads_per_node if whole else self.topology.heads
        offset = 0
        for name in bucket.names:
            own, scale = self.ownership[name], self._scale(name) / heads
            parts = own.parts if whole else (own.own,)
            formed = _joined(product(factors, offset, own.shape, self._rank(name), parts, scale))
            changes[name] = formed - previous[name].to(formed.device) if self.arrangement.resetless else formed
            if self.arrangement.resetless:
                previous[name].copy_(formed)
            offset += self.exchange.size([name])
        return changes

    def _mean_by_factors(self, bucket: Bucket, packed: Tensor) -> dict[str, Tensor]:
        stack = torch.stack([*self.history[bucket], packed])
        self.history[bucket].clear()
        gathered_KLhC = self.exchange.between_nodes(stack, self.exchange.size(bucket.names))
        if self.arrangement.resetless and (self.arrangement.folded or self.arrangement.two_level):
            self._changes(bucket, gathered_KLhC[self.topology.node], self.node_product, whole=True)
        return self._changes(bucket, gathered_KLhC, self.mean_product, whole=False)

    def _mean_by_products(self, bucket: Bucket, packed: Tensor, shards: Shards) -> dict[str, Tensor]:
        changes = self._node_changes(bucket, packed)
        if self.arrangement.two_level:
            for name in bucket.names:
                shard, change = shards[name], changes[name]
                moved = self.node_product[name] if self.arrangement.folded else change.to(shard.device)
                changes[name] = (shard + moved - self.outer.masters[name]).to(change.device)
        nodes, peers = self.topology.nodes, self.collectives.peers
        if not self.arrangement.spread:
            total = self.collectives.all_reduce(_joined(list(changes.values())), peers, "merge_dense")
            sizes = [change.numel() for change in changes.values()]
            return dict(zip(changes, (total / nodes).split(sizes), strict=True))
        padded = torch.cat([self._padded(name, change) for name, change in changes.items()], 1)
        total = self.collectives.reduce_scatter(padded, peers, "merge_dense") / nodes
        sizes = [self.ownership[name].part_size for name in changes]
        own = dict(zip(changes, total.split(sizes), strict=True))
        return {name: part[: length(self.ownership[name].own)] for name, part in own.items()}

    def _padded(self, name: str, change: Tensor) -> Tensor:
        """The parts of one weight as rows of equal length [K, part_size]."""
        own = self.ownership[name]
        rows = change.new_zeros(len(own.parts), own.part_size)
        for row, part in zip(rows, change.split([length(p) for p in own.parts]), strict=True):
            row[: part.numel()] = part
        return rows

    def _publish(self, bucket: Bucket, source: Mapping[str, Tensor], shards: Shards, *, fold: bool = True) -> None:
        """Write `source` (own parts) to where the forward pass reads it, less the folded product."""
        if self.arrangement.refined:
            own = [source[name] for name in bucket.names]
            sizes = [self.ownership[name].part_size for name in bucket.names]
            padded = [torch.nn.functional.pad(t, (0, s - t.numel())) for t, s in zip(own, sizes, strict=True)]
            message = torch.cat(padded).to(self.exchange.device)
            rows = self.collectives.all_gather(message, self.collectives.peers, "merge_refresh").split(sizes, 1)
            for name, parts in zip(bucket.names, rows, strict=True):
                lengths = [length(part) for part in self.ownership[name].parts]
                shards[name].copy_(torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]))
        else:
            for name in bucket.names:
                if shards[name].data_ptr() != source[name].data_ptr():
                    shards[name].copy_(source[name])
        if self.arrangement.folded and fold:
            for name in bucket.names:
                shards[name].sub_(self.node_product[name])

    def _clear_products(self) -> None:
        if not self.arrangement.resetless:
            return
        for bucket in self.buckets:
            for name in bucket.names:
                own, like = self.ownership[name], self.outer.masters[name]
                if self.arrangement.folded or self.arrangement.two_level or bucket.path == "dense":
                    self.node_product[name] = like.new_zeros(sum(map(length, own.parts)))
                if bucket.path == "factor":
                    self.mean_product[name] = like.new_zeros(length(own.own))

    @torch.no_grad()
    def restore_products(self) -> None:
        """Form the products of the last merge anew from the previous factors (resetless; after loading them)."""
        if not self.arrangement.resetless:
            return
        self._clear_products()
        for bucket in self.buckets:
            packed = self.exchange.pack(bucket.names, previous=True)
            if self.arrangement.folded or self.arrangement.two_level or bucket.path == "dense":
                self._node_changes(bucket, packed)
            if bucket.path == "factor":
                gathered = self.exchange.between_nodes(packed.unsqueeze(0), self.exchange.size(bucket.names))
                self._changes(bucket, gathered, self.mean_product, whole=False)

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master to the engine (after loading it)."""
        with self.editable() as shards:
            for bucket in self.buckets:
                self._publish(bucket, self.outer.masters, shards)

    @contextmanager
    def merged(self, *, average: bool = False) -> Iterator[None]:
        """Within: the model is that of the last global merge (or its moving average), without heads."""
        with self.editable() as shards:
            kept = {name: shard.clone() for name, shard in shards.items()}
            weights = dict(self.outer.averages if average else self.outer.masters)
            for bucket in self.buckets:
                self._publish(bucket, weights, shards, fold=False)
        kept_replicas = self.replicas.swap_in(average)
        self.heads.layout.active = False
        try:
            yield
        finally:
            self.heads.layout.active = True
            self.replicas.swap_out(kept_replicas)
            with self.editable() as shards:
                for name, shard in shards.items():
                    shard.copy_(kept[name])


def _cut(flat: Tensor, held: Slice, part: Slice) -> Tensor:
    """The elements of `part` from a flat tensor that holds `held`."""
    return flat[part[0] - held[0] : part[1] - held[0]]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
