"""The merge: heads into the base, inside a node every `local_every` steps, between nodes every `every` steps.

    W <- W + (s / N) sum_n B_n A_n                        reset      (arXiv 2402.16828, equation of section 3)
    W <- W + (s / N) sum_n (B_n A_n - B'_n A'_n)          resetless

Every rank forms and keeps its own part of every weight, and writes it through `engine.editable()`. Vocabulary:

    master    the weight at the last global merge, fp32; this rank owns a part of it
    compute   what the engine gathers for the forward pass; the master itself (no second copy) unless the node has
              moved since (local merges), a finer part is owned (scope `global` with a copy per node), or a
              resetless head's product is folded into its own base
    product   (s / h) sum B A of the node's heads, or (s / N) of all heads, at the last merge (resetless alone)

With `merge.delay` a global merge begins as a local one: the node goes on from its own weights, while what it has
changed since the last one crosses to the others in the background. When that lands, `delay` steps later, the master
takes the mean change and the node's weights become the master: what heads have learned meanwhile is in their factors,
and stays there. With `merge.fragments` parts of the model do so at different steps of the window (`cadence`).

In `merge.precision` other than fp32 a message holds less than it should. What it misses is not lost:

    dense path, replica parameters   it is added to the next window's change (`feedback`)
    factor path, reset               it stays in the head: B becomes B - B^ for the B^ sent, and B A is linear in B. A
                                     is sent in fp32: B (A - A^) has another rank r, which a head cannot keep
    factor path, resetless           A' and B' become the A^ and B^ sent: the head goes on from W + s (B A - B^ A^)
    copies of a finer master         they are told by how much the master has moved from what they hold (`copies`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, length
from lte_scale.collectives import Collectives
from lte_scale.copies import Copies
from lte_scale.dense import DenseExchange, joined
from lte_scale.engines.base import Engine, cut_from
from lte_scale.exchange import FactorExchange, Factors, product
from lte_scale.flight import Flight
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
        self.topology, self.config, self.cadence = arrangement.topology, arrangement.config.merge, arrangement.cadence
        ema_decay = arrangement.config.train.ema_decay
        self.link = collectives.aside() if self.cadence.delay else collectives
        self.flight: Flight | None = None
        self.exchange = FactorExchange(heads, collectives, codecs=arrangement.factor_codecs, link=self.link)
        self.clock: Stopwatch[tuple[str, str]] = Stopwatch(self.exchange.device)
        self.ownership = {
            name: arrangement.ownership(name, self.topology.rank, engine.slice_of) for name in heads.linears
        }
        self.paths, self.buckets = arrangement.paths, arrangement.buckets
        self.dense = DenseExchange(arrangement, self.link, self.ownership, self.exchange.device)
        self.copies = Copies(arrangement, collectives, self.ownership, self.exchange.device)
        self.history: dict[Bucket, list[Tensor]] = {bucket: [] for bucket in self.buckets}
        self.node_product: dict[str, Tensor] = {}
        self.mean_product: dict[str, Tensor] = {}
        self.outer = Outer(self.config, ema_decay)
        with self.editable() as shards:
            if self.arrangement.separate:
                for name, own in self.ownership.items():
                    self.outer.masters[name] = cut_from(shards[name], own.compute, own.own).clone()
            self.outer.start_average()
        self.replicas = ReplicaMerger(heads, collectives, self.config, ema_decay, arrangement.codec, self.link)
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
        """Whether there is anything to merge after `step`, inside the node or between nodes."""
        return self.cadence.due(step)

    @torch.no_grad()
    def merge(self, step: int, *, decay: float = 0.0, last: bool = False) -> None:
        """Merge after `step`, in all ranks.

        Args:
            decay: the fraction that a master loses when its merge lands (decoupled weight decay).
            last: the run ends here: all fragments are merged, and everybody waits for it.
        """
        if self.flight is not None and (last or self.cadence.lands(step) is not None):
            self._land(self.flight, decay)
        departing = self.cadence.sets_sent(step, last=last)
        delayed = bool(departing) and self.cadence.delay > 0 and not last
        scope = "global" if departing else "local"
        jobs: list[Callable[[], Tensor]] = []
        with self.editable() as shards:
            for bucket in self.buckets:
                with self.clock((scope, bucket.path)):
                    if bucket.fragment not in departing:
                        if self.cadence.is_local(step):
                            self._merge_locally(bucket, shards)
                    elif delayed:
                        jobs.append(self._depart(bucket, shards))
                    else:
                        self._merge_globally(bucket, shards, decay)
        with self.clock((scope, "replica")):
            if 0 in departing and delayed:
                jobs.append(partial(self.replicas.over_link, self.replicas.depart()))
            elif 0 in departing or self.cadence.is_local(step):
                self.replicas.merge(everywhere=0 in departing)
        if jobs:
            self.flight = Flight(jobs, self.exchange.device)
            self.departed = [bucket for bucket in self.buckets if bucket.fragment in departing]
        else:
            self.collectives.absorb(self.link)
        self.clock.lap()

    def _merge_locally(self, bucket: Bucket, shards: Shards, *, sent: bool = False) -> Tensor:
        """Returns this rank's part of the factors that the base has now. `sent`: and that will cross the link."""
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor" and (sent or not self.arrangement.resetless):
            packed = self.exchange.rounded(packed, bucket.names)  # to what a global merge will send of it
        if bucket.path == "factor" and not self.arrangement.resetless:
            self.history[bucket].append(packed.clone())  # else a view keeps the factors of all members alive
        factors = self.exchange.within_node(packed, bucket.names)
        for name, change in self._changes(bucket, factors, self.node_product, whole=True).items():
            if not self.arrangement.folded:  # a folded base holds W - s B' A', which a local merge leaves as it is
                shards[name].add_(change.to(shards[name].device))
        self._leave_to_base(bucket, factors)
        return packed

    def _merge_globally(self, bucket: Bucket, shards: Shards, decay: float) -> None:
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor":
            changes, factors = self._mean_by_factors(bucket, packed)
        else:
            factors = self.exchange.within_node(packed, bucket.names)
            changes = self._mean_by_products(bucket, factors, shards)
        self._update(bucket, changes, shards, decay)
        self._leave_to_base(bucket, factors)

    def _depart(self, bucket: Bucket, shards: Shards) -> Callable[[], Tensor]:
        """Merge inside the node; the exchange of what the node has changed since the last global merge."""
        packed = self._merge_locally(bucket, shards, sent=True)
        if bucket.path == "factor":
            stack = torch.stack(self.history[bucket] or [packed])
            self.history[bucket].clear()
            return partial(self.exchange.over_link, stack, bucket.names)
        changes = {}
        for name in bucket.names:
            folded = self.node_product[name] if self.arrangement.folded else 0.0
            changes[name] = (shards[name] + folded - self.outer.masters[name]).to(self.exchange.device)
        return partial(self.dense.reduce, bucket, changes)

    def _land(self, flight: Flight, decay: float) -> None:
        """Apply what has been under way, when it has arrived."""
        with self.clock(("global", "wait")), self.collectives.call(self.collectives.peers, "merge_wait", 0):
            arrived = flight.arrived()
        with self.editable() as shards:
            for bucket, message in zip(self.departed, arrived, strict=False):  # the replica parameters come last
                with self.clock(("global", bucket.path)):
                    if bucket.path == "factor":
                        factors = self.exchange.received(message, bucket.names)
                        changes = self._changes(bucket, factors, self.mean_product, whole=False)
                    else:
                        changes = self.dense.own_parts(bucket, message)
                    self._update(bucket, changes, shards, decay)
        if len(arrived) > len(self.departed):
            with self.clock(("global", "replica")):
                self.replicas.land(arrived[-1])
        self.flight = None
        self.collectives.absorb(self.link)

    def _update(self, bucket: Bucket, changes: Mapping[str, Tensor], shards: Shards, decay: float) -> None:
        """The masters take the mean changes, and the forward pass sees it."""
        for name, change in changes.items():
            self.outer.update(name, change, decay)
        if self.arrangement.followed:
            self.copies.follow(bucket, self.outer.masters, shards)
        else:
            self._publish(bucket, self.outer.masters, shards)

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
        if self.arrangement.resetless and (self.arrangement.folded or self.arrangement.roaming):
            self._changes(bucket, of_node, self.node_product, whole=True)
        return self._changes(bucket, all_KLhC, self.mean_product, whole=False), of_node

    def _mean_by_products(self, bucket: Bucket, factors: Factors, shards: Shards) -> dict[str, Tensor]:
        changes = self._changes(bucket, factors, self.node_product, whole=True)
        if self.arrangement.roaming:
            for name in bucket.names:
                shard, change = shards[name], changes[name]
                moved = self.node_product[name] if self.arrangement.folded else change.to(shard.device)
                changes[name] = (shard + moved - self.outer.masters[name]).to(change.device)
        return self.dense.mean(bucket, changes)

    def _publish(self, bucket: Bucket, source: Mapping[str, Tensor], shards: Shards, *, fold: bool = True) -> None:
        """Write `source` (own parts) to where the forward pass reads it, less the folded product."""
        self.copies.publish(bucket, source, shards)
        if self.arrangement.folded and fold:
            for name in bucket.names:
                shards[name].sub_(self.node_product[name])

    def _clear_products(self) -> None:
        if not self.arrangement.resetless:
            return
        for bucket in self.buckets:
            for name in bucket.names:
                own, like = self.ownership[name], self.outer.masters[name]
                if self.arrangement.folded or self.arrangement.roaming or bucket.path == "dense":
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
            if self.arrangement.folded or self.arrangement.roaming or bucket.path == "dense":
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
