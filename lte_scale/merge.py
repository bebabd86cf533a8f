"""The merge: heads into the base, inside a node every `local_every` steps, between all nodes every `every` steps.

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

Nodes of a region merge among themselves every `region_every` steps, on the dense path: what each has changed since the
last global merge becomes their mean. The mean over all nodes stays what it is, so a global merge need not know.

In `merge.precision` other than fp32 a message holds less than it should. What it misses is not lost:

    dense path, replica parameters   it is added to the next window's change (`feedback`)
    factor path, reset               it stays in the head: B becomes B - B^ for the B^ sent, and B A is linear in B. Not
                                     so B^ (A - A^), which has another rank r: a head merges as if its A were the A^
                                     sent, which has 8 bits or more, and goes on with A
    factor path, resetless           A' and B' become the A^ and B^ sent: the head goes on from W + s (B A - B^ A^)
    copies of a finer master         they are told by how much the master has moved from what they hold (`copies`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lte_scale import agreement
from lte_scale.arrangement import Arrangement, Bucket
from lte_scale.collectives import Collectives
from lte_scale.copies import Copies
from lte_scale.dense import DenseExchange
from lte_scale.engines.base import Engine, cut_from
from lte_scale.exchange import FactorExchange, Factors
from lte_scale.flight import Flight
from lte_scale.initial import seed_of
from lte_scale.model import Heads
from lte_scale.outer import Outer
from lte_scale.products import Products
from lte_scale.replicas import ReplicaMerger
from lte_scale.timing import Stopwatch

Shards = Mapping[str, Tensor]


class Place(NamedTuple):
    """Where a run is: its step, the position in its data, and how many merges of all nodes there have been."""

    step: int
    position: int
    merges: int


class Course(Protocol):
    """A run as its merges see it, where it is one of several that merge together."""

    @property
    def place(self) -> Place: ...

    def go_to(self, place: Place) -> None:
        """Be where the other nodes are."""

    def interrupted(self) -> bool:
        """Whether to wait no longer for other nodes; asked all the time while waiting."""


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
        self.flight: Flight[Bucket | str] | None = None
        self.exchange = FactorExchange(heads, collectives, codecs=arrangement.factor_codecs, link=self.link)
        self.clock: Stopwatch[tuple[str, str]] = Stopwatch(self.exchange.device)
        self.ownership = {
            name: arrangement.ownership(name, self.topology.rank, engine.slice_of) for name in heads.linears
        }
        self.paths, self.buckets = arrangement.paths, arrangement.buckets
        self.dense = DenseExchange(arrangement, self.link, self.ownership, self.exchange.device)
        self.region: DenseExchange | None = None
        if self.cadence.region_every:
            self.region = DenseExchange(arrangement, collectives, self.ownership, self.exchange.device, regional=True)
        self.copies = Copies(arrangement, collectives, self.ownership, self.exchange.device)
        self.history: dict[Bucket, list[Tensor]] = {bucket: [] for bucket in self.buckets}
        self.outer = Outer(self.config, ema_decay)
        with self.editable() as shards:
            if self.arrangement.separate:
                for name, own in self.ownership.items():
                    self.outer.masters[name] = cut_from(shards[name], own.compute, own.own).clone()
            self.outer.start_average()
        self.replicas = ReplicaMerger(heads, collectives, self.config, ema_decay, arrangement.codec, self.link)
        self.products = Products(heads, arrangement, self.ownership, self.outer.masters)

    @contextmanager
    def editable(self) -> Iterator[Shards]:
        """The engine's parts of all weights; within, `outer.masters` are what they are even where they alias them."""
        exact = torch.autocast(self.exchange.device.type, enabled=False)  # a loop may call this under its own autocast
        with torch.no_grad(), exact, self.engine.editable() as shards:
            if not self.arrangement.separate:
                self.outer.masters.update(shards)
            yield shards

    def join(self, course: Course) -> None:
        """Before the first step: be where the rest of the run is. Here it is all in this job."""

    def close(self) -> None:
        """After the last merge: let go of what is shared with other jobs. Here nothing is."""

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
        delayed = bool(departing) and self.cadence.takes_time(step) and not last
        scope = "global" if departing else "local"
        jobs: dict[Bucket | str, Callable[[], Tensor]] = {}
        with self.editable() as shards:
            verified = self._compare_masters() if 0 in departing and self.topology.nodes > 1 else None
            if verified is not None and not delayed:
                self._check(verified())
            for bucket in self.buckets:
                with self.clock((scope, bucket.path)):
                    if bucket.fragment not in departing:
                        if self.cadence.is_local(step):
                            self._merge_locally(bucket, shards)
                        if self.region and self.cadence.is_regional(step):
                            self._merge_in_region(self.region, bucket, shards)
                    elif delayed:
                        jobs[bucket] = self._depart(bucket, shards)
                    else:
                        self._merge_globally(bucket, shards, decay)
        with self.clock((scope, "replica")):
            if 0 in departing and delayed:
                jobs["replicas"] = partial(self.replicas.over_link, self.replicas.depart())
                jobs |= {"masters": verified} if verified else {}
            elif 0 in departing:
                self.replicas.merge()
            elif self.cadence.is_local(step):
                self.replicas.merge_locally(regional=self.cadence.is_regional(step))
        if departing and self.arrangement.config.adapters.redraw:  # every B is zero
            self.heads.initialise(seed_of(self.arrangement.config.seed, step))
        if jobs:
            self.flight = Flight(jobs, self.exchange.device)
        else:
            self.collectives.absorb(self.link)
        self.clock.lap()

    def withdraw(self, index: int, step: int) -> None:
        """Before the merge after `step`: the head at `index` starts again from the base, its change is none."""
        self.heads.start_again(index, seed_of("withdrawn", self.arrangement.config.seed, step))
        self.replicas.start_again(index)

    def _merge_locally(self, bucket: Bucket, shards: Shards, *, sent: bool = False) -> Tensor:
        """Returns this rank's part of the factors that the base has now. `sent`: and that will cross the link."""
        packed = self.exchange.pack(bucket.names)
        if bucket.path == "factor" and (sent or not self.arrangement.resetless):
            packed = self.exchange.rounded(packed, bucket.names)  # to what a global merge will send of it
        if bucket.path == "factor" and not self.arrangement.resetless:
            self.history[bucket].append(packed.clone())  # else a view keeps the factors of all members alive
        factors = self.exchange.within_node(packed, bucket.names)
        for name, change in self.products.of_node(bucket, factors).items():
            if not self.arrangement.folded:  # a folded base holds W - s B' A', which a local merge leaves as it is
                shards[name].add_(change.to(shards[name].device))
        self._leave_to_base(bucket, factors)
        return packed

    def _merge_in_region(self, region: DenseExchange, bucket: Bucket, shards: Shards) -> None:
        """After a merge inside the node: it goes on from the mean of the region's nodes."""
        masters, means = self.outer.masters, region.mean(bucket, self._moved(bucket, shards))
        weights = {name: masters[name] + mean.to(masters[name].device) for name, mean in means.items()}
        self._publish(bucket, weights, shards)

    def _moved(self, bucket: Bucket, shards: Shards) -> dict[str, Tensor]:
        """What this node has changed of each weight since the last global merge."""
        changes = {}
        for name in bucket.names:
            folded = self.products.node[name] if self.arrangement.folded else 0.0
            changes[name] = (shards[name] + folded - self.outer.masters[name]).to(self.exchange.device)
        return changes

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
        return partial(self.dense.reduce, bucket, self._moved(bucket, shards))

    def _land(self, flight: Flight[Bucket | str], decay: float) -> None:
        """Apply what has been under way, when all of it has arrived."""
        with self.clock(("global", "wait")), self.collectives.call(self.collectives.peers, "merge_wait", 0):
            arrived = flight.arrived()
        if "masters" in arrived:
            self._check(arrived["masters"])
        with self.editable() as shards:
            for bucket in filter(arrived.__contains__, self.buckets):
                with self.clock(("global", bucket.path)):
                    if bucket.path == "factor":
                        factors = self.exchange.received(arrived[bucket], bucket.names)
                        changes = self.products.of_all(bucket, factors)
                    else:
                        changes = self.dense.own_parts(bucket, arrived[bucket])
                    self._update(bucket, changes, shards, decay)
        if "replicas" in arrived:
            with self.clock(("global", "replica")):
                self.replicas.land(arrived["replicas"])
        self.flight = None
        self.collectives.absorb(self.link)

    def _compare_masters(self) -> Callable[[], Tensor]:
        """What brings together the peers' fingerprints [K]."""
        return partial(self.link.all_gather, self._fingerprint(), self.link.peers, "merge_check")

    def _fingerprint(self) -> Tensor:
        """Of the masters that all peers hold alike [1]."""
        equal = [*self.replicas.outer.masters.values()]
        if not self.arrangement.spread:
            equal += self.outer.masters.values()
        return agreement.fingerprint(equal, self.exchange.device)

    def _check(self, prints: Tensor) -> None:
        agreement.check(prints.flatten().tolist(), self.topology.peer_ranks(self.topology.local_rank))

    def _update(self, bucket: Bucket, changes: Mapping[str, Tensor], shards: Shards, decay: float) -> None:
        """The masters take the mean changes, and the forward pass sees it."""
        for name, change in changes.items():
            self.outer.update(name, change, decay)
        if self.region and bucket.path == "factor" and bucket in self.region.feedback:
            self.region.feedback[bucket].forget()  # the factors have told all of it
        if self.arrangement.followed:
            self.copies.follow(bucket, self.outer.masters, shards)
        else:
            self._publish(bucket, self.outer.masters, shards)

    def _leave_to_base(self, bucket: Bucket, factors: Factors) -> None:
        """Take from this rank's heads what the base has of them now: `factors` of the node's heads [h, values]."""
        mine = [head % self.topology.heads_per_node for head in self.topology.my_heads]
        for name, (A, B) in self.products.by_weight(bucket, factors).items():
            layer = self.heads.linears[name]
            A, B = A[mine].view_as(layer.A), B[mine].view_as(layer.B)
            if layer.A_prev is None or layer.B_prev is None:
                layer.B.sub_(B)
            else:
                layer.A_prev.copy_(A)
                layer.B_prev.copy_(B)

    def _mean_by_factors(self, bucket: Bucket, packed: Tensor) -> tuple[dict[str, Tensor], Factors]:
        """The mean change, and the factors of the node's heads that went into it last."""
        stack = torch.stack([*self.history[bucket], packed])
        self.history[bucket].clear()
        all_KLhC = self.exchange.between_nodes(stack, bucket.names)
        of_node = Factors(all_KLhC.A[self.topology.node, -1], all_KLhC.B[self.topology.node, -1])
        if self.products.keeps_node(bucket):
            self.products.of_node(bucket, of_node)
        return self.products.of_all(bucket, all_KLhC), of_node

    def _mean_by_products(self, bucket: Bucket, factors: Factors, shards: Shards) -> dict[str, Tensor]:
        changes = self.products.of_node(bucket, factors)
        if self.arrangement.roaming:
            for name in bucket.names:
                shard, change = shards[name], changes[name]
                moved = self.products.node[name] if self.arrangement.folded else change.to(shard.device)
                changes[name] = (shard + moved - self.outer.masters[name]).to(change.device)
        return self.dense.mean(bucket, changes)

    def _publish(self, bucket: Bucket, source: Mapping[str, Tensor], shards: Shards, *, fold: bool = True) -> None:
        """Write `source` (own parts) to where the forward pass reads it, less the folded product."""
        self.copies.publish(bucket, source, shards)
        if self.arrangement.folded and fold:
            for name in bucket.names:
                shards[name].sub_(self.products.node[name])

    @torch.no_grad()
    def restore(self) -> None:
        """After loading the masters and the factors: what follows from them, and the weights that are computed with."""
        self.products.restore(self.collectives, self.buckets)
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
