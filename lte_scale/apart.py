"""The merge of nodes that are jobs of their own (`fault_tolerance`): the mean over those that are there.

    W <- W + (s / h) (1 / |K|) sum_{k in K} sum_{n in node k} B_n A_n        K: the nodes with a window to give

A global merge is one sum over the nodes that have gathered (`quorum`): what every node has changed of the weights since
the last one, and what its heads have made of the replica parameters. First each says in a *roll call* where it is. A
node that is new, or was away, has nothing to give; one that has missed merges takes masters, momenta and averages from
one that has not, bit for bit. All then update the same masters by the same mean, and stand at the same step. If a node
is lost on the way nothing has changed anywhere, and the others gather again.

Merges inside the node are those of `Merger`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lte_scale import agreement
from lte_scale.arrangement import Arrangement, Bucket
from lte_scale.collectives import Collectives
from lte_scale.dense import joined
from lte_scale.engines.base import Engine
from lte_scale.exchange import Factors
from lte_scale.initial import seed_of
from lte_scale.log import log
from lte_scale.merge import Course, Merger, Place, Shards
from lte_scale.model import Heads
from lte_scale.quorum import Quorum

_TRIES = 5
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """What this rank brings to a merge: its parts of the node's changes, by bucket, and of its replica parameters."""

    factors: Mapping[Bucket, Factors]
    changes: Mapping[Bucket, Tensor]
    replicas: Tensor


class RollCall:
    """What every node says of itself: a table of whole numbers [nodes, columns] of which each fills its own row."""

    COLUMNS = ("present", "gives", "behind", "step", "position", "print")

    def __init__(self, table: Tensor) -> None:
        """`table`: the sum of all nodes' tables."""
        rows = [dict(zip(self.COLUMNS, row, strict=True)) for row in table.tolist()]
        self.nodes = {node: row for node, row in enumerate(rows) if row["present"]}

    @classmethod
    def of(cls, node: int, nodes: int, device: torch.device, **said: int) -> Tensor:
        """The table that only `node` has filled."""
        table = torch.zeros(nodes, len(cls.COLUMNS), dtype=torch.int64, device=device)
        table[node] = torch.tensor([said[column] for column in cls.COLUMNS], device=device)
        return table

    @property
    def givers(self) -> int:
        """Nodes that have a window to give."""
        return sum(row["gives"] for row in self.nodes.values())

    @property
    def behind(self) -> list[int]:
        """Nodes that have missed merges."""
        return [node for node, row in self.nodes.items() if row["behind"]]

    @property
    def healer(self) -> int:
        """The node that those behind take their masters from."""
        return min(node for node, row in self.nodes.items() if not row["behind"])

    def furthest(self, column: str) -> int:
        """The largest value of a column."""
        return max(row[column] for row in self.nodes.values())

    @property
    def claimed_twice(self) -> list[int]:
        """Numbers that several nodes say are theirs."""
        return [node for node, row in self.nodes.items() if row["present"] > 1]

    def check(self, node: int) -> None:
        """Compare the masters of those that are not behind.

        Raises:
            agreement.Disagreement: in the nodes whose masters are not those of most; the others go on without them.
        """
        prints = {other: row["print"] for other, row in self.nodes.items() if not row["behind"]}
        nodes, values = list(prints), list(prints.values())
        if node in agreement.strays(values, nodes):
            agreement.check(values, nodes)


class MergerApart(Merger):
    """A `Merger` of one node among others that come and go.

    Attributes:
        course: this node's run, once it has joined.
    """

    course: Course

    def __init__(self, heads: Heads, engine: Engine, collectives: Collectives, arrangement: Arrangement) -> None:
        """Raises ValueError if the lighthouse does not answer."""
        super().__init__(heads, engine, collectives, arrangement)
        self.fault_tolerance = arrangement.config.fault_tolerance
        self.quorum = Quorum(self.fault_tolerance, collectives, self.exchange.device)
        self._together = 0
        self._configured = _digest(arrangement)

    def close(self) -> None:
        self.quorum.close()

    def join(self, course: Course) -> None:
        """Meet the other nodes at their next merge, to which this one brings nothing, and go on from there.

        Where all begin (or resume) they meet at once and nothing changes; they wait a while for those not there yet.
        """
        self.course = course
        self.quorum.merges = course.place.merges
        log.info("waiting for the other nodes at their next merge")
        until = time.monotonic() + self.fault_tolerance.wait_seconds
        while True:
            called = self._meet(None, 0.0)
            if called.givers or len(called.nodes) == self.fault_tolerance.nodes or time.monotonic() > until:
                return
            time.sleep(_PAUSE_SECONDS)

    @torch.no_grad()
    def merge(self, step: int, *, decay: float = 0.0, last: bool = False) -> None:
        if not self.cadence.sets_sent(step, last=last):
            super().merge(step, decay=decay, last=last)
            return
        with self.editable() as shards, self.clock(("global", "dense")):
            window = self._window(shards)
        self._meet(window, decay)

    def _window(self, shards: Shards) -> Window:
        factors, changes = {}, {}
        for bucket in self.buckets:
            factors[bucket] = self.exchange.within_node(self.exchange.pack(bucket.names), bucket.names)
            changes[bucket] = joined(list(self._mean_by_products(bucket, factors[bucket], shards).values()))
        return Window(factors, changes, self.replicas.part_of_node())

    @torch.no_grad()
    def _meet(self, window: Window | None, decay: float) -> RollCall:
        """A merge of all nodes that are there, to which this one brings `window`. Collective in the node.

        Raises:
            Interrupted: if this node was told to end while it waited; nothing has changed.
            RuntimeError: if nodes are lost in try after try.
        """
        behind = False
        for attempt in range(1, _TRIES + 1):
            with self.clock(("global", "wait")):
                behind |= self.quorum.gather(self.course.interrupted)
            with self.editable() as shards, self.clock(("global", "dense")):
                called = self._try_together(window, decay, shards, behind=behind)
            if called is not None:
                self.clock.lap()
                return called
            log.warning("a node was lost in the merge; gathering again (try %d of %d)", attempt, _TRIES)
        raise RuntimeError(f"nodes were lost in {_TRIES} tries of one merge; see their logs and the network")

    def _try_together(self, window: Window | None, decay: float, shards: Shards, *, behind: bool) -> RollCall | None:
        """Who was there; None if it has not worked, and then nothing has changed."""
        self._compare_configurations(joins=window is None)
        called = self._roll_call(gives=window is not None and not behind, behind=behind)
        if called.claimed_twice and not self.quorum.failed:
            self._refuse(f"fault_tolerance.node: {called.claimed_twice[0]} is the number of two nodes", window is None)
        if self.quorum.failed:
            self.quorum.agree(counts=False)
            return None
        called.check(self.fault_tolerance.node)
        healed = self._heal(called) if called.behind else []
        sums = self._sums(None if behind else window) if called.givers else None
        if not self.quorum.agree(counts=sums is not None):
            return None
        if behind:
            for tensor, bits in zip(self._whole_state(), healed, strict=True):
                tensor.copy_(bits.view(torch.float32).view_as(tensor))
        if sums is not None or behind:
            self._tell(called, behind=behind)
            self._take(sums, called, window, decay, shards)
        place = Place(called.furthest("step"), called.furthest("position"), self.quorum.merges)
        if sums is not None and self.arrangement.config.adapters.redraw:  # every B is zero
            self.heads.initialise(seed_of(self.arrangement.config.seed, place.step))
        self.course.go_to(place)
        return called

    def _compare_configurations(self, *, joins: bool) -> None:
        """Before anything is summed whose shape depends on it."""
        found = torch.tensor([1, self._configured], dtype=torch.int64, device=self.exchange.device)
        nodes, total = self.quorum.sum(found, "merge_check").tolist()
        if total != nodes * self._configured and not self.quorum.failed:
            self._refuse("fault_tolerance: another node has other nodes, ranks, model, adapters, merge or train", joins)

    def _refuse(self, reason: str, joins: bool) -> None:
        """A node that joins does not; those that have a window to give go on without it.

        Raises:
            ValueError: in a node that joins.
        """
        if joins:
            raise ValueError(f"{reason}; start all nodes with the same configuration, each with its own number")
        self.quorum.reject(reason)

    def _roll_call(self, *, gives: bool, behind: bool) -> RollCall:
        ft, place = self.fault_tolerance, self.course.place
        table = RollCall.of(
            ft.node, ft.nodes, self.exchange.device,
            present=1, gives=gives, behind=behind, step=place.step, position=place.position,
            print=int(self._fingerprint()),
        )  # fmt: skip
        return RollCall(self.quorum.sum(table, "merge_check"))

    def _whole_state(self) -> list[Tensor]:
        """All that a node must hold as the others do, on this rank's parts."""
        outers = (self.outer, self.replicas.outer)
        return list(chain(*(kind.values() for o in outers for kind in (o.masters, o.momenta, o.averages))))

    def _heal(self, called: RollCall) -> list[Tensor]:
        """The bits of the healer's state: a sum of whole numbers to which the others add zero."""
        gives = called.healer == self.fault_tolerance.node
        found = []
        for tensor in self._whole_state():
            bits = tensor.detach().to(self.exchange.device).contiguous().view(-1).view(torch.int32)
            found.append(self.quorum.sum(bits.clone() if gives else torch.zeros_like(bits), "merge_refresh"))
        return found

    def _sums(self, window: Window | None) -> dict[Bucket | str, Tensor]:
        """The sum of all nodes' windows."""
        found: dict[Bucket | str, Tensor] = {}
        for bucket in self.buckets:
            values = sum(self.outer.masters[name].numel() for name in bucket.names)
            message = window.changes[bucket].clone() if window else torch.zeros(values, device=self.exchange.device)
            found[bucket] = self.quorum.sum(message, "merge_dense")
        values = self.arrangement.replica_part
        message = window.replicas.clone() if window else torch.zeros(values, device=self.exchange.device)
        return found | {"replicas": self.quorum.sum(message, "merge_replica")}

    def _take(
        self,
        sums: Mapping[Bucket | str, Tensor] | None,
        called: RollCall,
        window: Window | None,
        decay: float,
        shards: Shards,
    ) -> None:
        """The masters take the mean change (if any), and the forward pass and the heads go on from them."""
        factors = (window or self._window(shards)).factors  # formed for what follows from it: the node's products
        for bucket in self.buckets:
            if sums is None:
                self._publish(bucket, self.outer.masters, shards)
            else:
                changes = self.dense.own_parts(bucket, sums[bucket] / called.givers)
                self._update(bucket, changes, shards, decay)
            self._leave_to_base(bucket, factors[bucket])
        if sums is not None:
            self.replicas.take(sums["replicas"] / called.givers)
        else:
            self.replicas.write(self.replicas.outer.masters)

    def _tell(self, called: RollCall, *, behind: bool) -> None:
        here, step = len(called.nodes), called.furthest("step")
        if behind:
            log.info(
                "step %d: brought up to date by node %d, from step %d", step, called.healer, self.course.place.step
            )
        if here != self._together:
            there = f" (nodes {', '.join(map(str, called.nodes))})" if here < self.fault_tolerance.nodes else ""
            log.info("step %d: merging with %d of %d nodes%s", step, here, self.fault_tolerance.nodes, there)
        self._together = here


def _digest(a: Arrangement) -> int:
    """A number of 32 bits for what nodes must have in common."""
    c, t = a.config, a.topology
    alike = (c.model, c.adapters, c.merge, c.train, c.seed, t.all_nodes, t.ranks_per_node, t.heads_per_node)
    return int.from_bytes(hashlib.sha256(repr(alike).encode()).digest()[:4], "big")
