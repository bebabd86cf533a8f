"""The merge: heads into the base, inside a node every `local_every` steps, between nodes every `every` steps.

    W <- W + (s / N) sum_n B_n A_n                        reset      (arXiv 2402.16828, equation of section 3)
    W <- W + (s / N) sum_n (B_n A_n - B'_n A'_n)          resetless

Every rank forms and keeps its own part of every weight, and writes it through `engine.editable()`. Vocabulary:

    master    the weight at the last global merge, fp32; this rank owns a part of it
    compute   what the engine gathers for the forward pass; the master itself (no second copy) unless the node has
              moved since (local merges), a finer part is owned (scope `global` with a copy per node), or a
              resetless head's product is folded into its own base
    product   (s / h) sum B A of the node's heads, or (s / N) of all heads, at the last merge (resetless alone)

In `merge.precision` other than fp32 a message holds less than it should. What it misses is not lost:

    dense path, replica parameters   it is added to the next window's change (`feedback`)
    factor path, reset               it stays in the head: B becomes B - B^ for the B^ sent, and B A is linear in B. A
                                     is sent in fp32: B (A - A^) has another rank r, which a head cannot keep
    factor path, resetless           A' and B' become the A^ and B^ sent: the head goes on from W + s (B A - B^ A^)
    copies of a finer master         they are told by how much the master has moved from what they hold
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, length
from lte_scale.codec import Codec
from lte_scale.collectives import Collectives
from lte_scale.dense import DenseExchange, joined
from lte_scale.engines.base import Engine, Slice
from lte_scale.exchange import FactorExchange, Factors, product
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
        self.exchange = FactorExchange(heads, collectives, codecs=arrangement.factor_codecs)
        self.clock: Stopwatch[tuple[str, str]] = Stopwatch(self.exchange.device)
        self.ownership = {
            name: arrangement.ownership(name, self.topology.rank, engine.slice_of) for name in heads.linears
        }
        self.paths, self.buckets = arrangement.paths, arrangement.buckets
        self.dense = DenseExchange(arrangement, collectives, self.ownership, self.exchange.device)
        self.history: dict[Bucket, list[Tensor]] = {bucket: [] for bucket in self.buckets}
        self.node_product: dict[str, Tensor] = {}
        self.mean_product: dict[str, Tensor] = {}
        self.outer = Outer(self.config, ema_decay)
        with self.editable() as shards:
            if self.arrangement.separate:
                for name, own in self.ownership.items():
                    self.outer.masters[name] = _cut(shards[name], own.compute, own.own).clone()
            self.outer.start_average()
        self.replicas = ReplicaMerger(heads, collectives, self.config, ema_decay, arrangement.codec)
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

    def _merge_locally(self, bucket: Bucket, shards: Shards) -> None:
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor" and not self.arrangement.resetless:
            packed = self.exchange.rounded(packed, bucket.names)  # to what a global merge will send of it
            self.history[bucket].append(packed.clone())  # else a view keeps the factors of all members alive
        factors = self.exchange.within_node(packed, bucket.names)
        for name, change in self._changes(bucket, factors, self.node_product, whole=True).items():
            if not self.arrangement.folded:  # a folded base holds W - s B' A', which a local merge leaves as it is
                shards[name].add_(change.to(shards[name].device))
        self._leave_to_base(bucket, factors)

    def _merge_globally(self, bucket: Bucket, shards: Shards, decay: float) -> None:
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor":
            changes, factors = self._mean_by_factors(bucket, packed)
        else:
            factors = self.exchange.within_node(packed, bucket.names)
            changes = self._mean_by_products(bucket, factors, shards)
        for name, change in changes.items():
            self.outer.update(name, change, decay)
        if self.arrangement.followed:
            self._follow(bucket, shards)
        else:
            self._publish(bucket, self.outer.masters, shards)
        self._leave_to_base(bucket, factors)

    def _leave_to_base(self, bucket: Bucket, factors: Factors) -> None:
        """Take from this rank's heads what the base has of them now: `factors` of the node's heads [h, values]."""
        mine = [head % self.topology.heads_per_node for head in self.topology.my_heads]
        for name, (A, B) in self._by_weight(bucket, factors).items():
            layer = self.heads.linears[name]
            A, B = A[mine].view_as(layer.A), B[mine].view_as(layer.B)
            if layer.A_prev is None or layer.B_prev is None:
                layer.B.sub_(B)
            else:
                layer.A_prev.copy_(A)
                layer.B_prev.copy_(B)

    def _by_weight(self, bucket: Bucket, factors: Factors) -> dict[str, Factors]:
        sizes_A, sizes_B = zip(*(self.exchange.sizes([name]) for name in bucket.names), strict=True)
        split = zip(bucket.names, factors.A.split(sizes_A, -1), factors.B.split(sizes_B, -1), strict=True)
        return {name: Factors(A, B) for name, A, B in split}

    def _changes(
        self, bucket: Bucket, factors: Factors, previous: MutableMapping[str, Tensor], *, whole: bool
    ) -> dict[str, Tensor]:
        """The mean over `factors` [..., heads, values] of each weight's product, less `previous`, which it replaces.

        `whole`: of the node's heads on the parts this rank forms [elements], else of all heads on the part it owns.
        """
        changes: dict[str, Tensor] = {}
        heads = self.topology.heads_per_node if whole else self.topology.heads
        for name, of_weight in self._by_weight(bucket, factors).items():
            own, scale = self.ownership[name], self._scale(name) / heads
            parts = own.parts if whole else (own.own,)
            formed = joined(product(of_weight, own.shape, self._rank(name), parts, scale))
            changes[name] = formed - previous[name].to(formed.device) if self.arrangement.resetless else formed
            if self.arrangement.resetless:
                previous[name].copy_(formed)
        return changes

    def _mean_by_factors(self, bucket: Bucket, packed: Tensor) -> tuple[dict[str, Tensor], Factors]:
        """The mean change, and the factors of the node's heads that went into it last."""
        stack = torch.stack([*self.history[bucket], packed])
        self.history[bucket].clear()
        all_KLhC = self.exchange.between_nodes(stack, bucket.names)
        of_node = Factors(all_KLhC.A[self.topology.node, -1], all_KLhC.B[self.topology.node, -1])
        if self.arrangement.resetless and (self.arrangement.folded or self.arrangement.two_level):
            self._changes(bucket, of_node, self.node_product, whole=True)
        return self._changes(bucket, all_KLhC, self.mean_product, whole=False), of_node

    def _mean_by_products(self, bucket: Bucket, factors: Factors, shards: Shards) -> dict[str, Tensor]:
        changes = self._changes(bucket, factors, self.node_product, whole=True)
        if self.arrangement.two_level:
            for name in bucket.names:
                shard, change = shards[name], changes[name]
                moved = self.node_product[name] if self.arrangement.folded else change.to(shard.device)
                changes[name] = (shard + moved - self.outer.masters[name]).to(change.device)
        return self.dense.mean(bucket, changes)

    def _publish(self, bucket: Bucket, source: Mapping[str, Tensor], shards: Shards, *, fold: bool = True) -> None:
        """Write `source` (own parts) to where the forward pass reads it, less the folded product."""
        if self.arrangement.refined:
            for name, values in self._of_peers(bucket, source, Codec()).items():
                shards[name].copy_(values)
        else:
            for name in bucket.names:
                if shards[name].data_ptr() != source[name].data_ptr():
                    shards[name].copy_(source[name])
        if self.arrangement.folded and fold:
            for name in bucket.names:
                shards[name].sub_(self.node_product[name])

    def _follow(self, bucket: Bucket, shards: Shards) -> None:
        """Move every node's copy towards the masters; it lags behind by what messages miss, on all nodes alike."""
        moved = {}
        for name in bucket.names:
            own = self.ownership[name]
            moved[name] = self.outer.masters[name] - _cut(shards[name], own.compute, own.own)
        for name, change in self._of_peers(bucket, moved, self.arrangement.codec).items():
            shards[name].add_(change.to(shards[name].device))

    def _of_peers(self, bucket: Bucket, own: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
        """`own` parts of all peers, as all of them decode it, joined to what this rank computes with."""
        sizes = {name: self.ownership[name].part_size for name in bucket.names}
        padded = [F.pad(own[name], (0, size - own[name].numel())) for name, size in sizes.items()]
        message = codec.encode(torch.cat(padded).to(self.exchange.device))
        gathered = self.collectives.all_gather(message, self.collectives.peers, "merge_refresh")
        found = {}
        decoded = codec.decode(gathered, sum(sizes.values())).split(list(sizes.values()), 1)
        for name, rows in zip(sizes, decoded, strict=True):
            lengths = [length(part) for part in self.ownership[name].parts]
            found[name] = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
        return found

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
        exchange = FactorExchange(self.heads, self.collectives)  # in fp32: of other bits than now, if precision changed
        for bucket in self.buckets:
            packed = exchange.pack(bucket.names, previous=True)
            if self.arrangement.folded or self.arrangement.two_level or bucket.path == "dense":
                factors = exchange.within_node(packed, bucket.names)
                self._changes(bucket, factors, self.node_product, whole=True)
            if bucket.path == "factor":
                factors = exchange.between_nodes(packed.unsqueeze(0), bucket.names)
                self._changes(bucket, factors, self.mean_product, whole=False)

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
