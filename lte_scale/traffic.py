"""Which bytes move, as arithmetic: what `plan` prints and the byte counters must show.

Every function is of one rank of an `Arrangement`, the links as in `collectives`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace

from lte_scale.arrangement import FP32, Arrangement, Bucket
from lte_scale.codec import Codec
from lte_scale.collectives import (
    SCOPES,
    Scope,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    reduce_scatter_bytes,
)
from lte_scale.topology import Topology

FINGERPRINT = 8
"""Bytes in which a rank tells its peers of its masters (`agreement`)."""

ROLL_CALL, CONFIGURED = 48, 16
"""Bytes in which a rank says where a node is, and of its configuration, where nodes are jobs of their own (`apart`)."""

Traffic = Counter[tuple[Scope, str]]
"""Bytes sent by (scope, purpose), as `Collectives.bytes_sent` counts them."""


class Links:
    """The groups of one rank, and the bytes it sends in them.

    Attributes:
        sent: by (scope, purpose), as `Collectives.bytes_sent`.
    """

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology = replace(topology, rank=rank)
        t, self.sent = self.topology, Traffic()
        self.world, self.node = list(range(t.world_size)), t.node_ranks(t.node)
        self.peers, self.region = t.peer_ranks(t.local_rank), t.region_peers(t.node, t.local_rank)
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

    def all_to_all(self, group: Sequence[int], purpose: str, message_bytes: int) -> None:
        self._send(group, purpose, all_to_all_bytes(len(group), message_bytes))

    def all_gather(self, group: Sequence[int], purpose: str, part_bytes: int) -> None:
        self._send(group, purpose, all_gather_bytes(len(group), part_bytes))

    def between_jobs(self, jobs: int, purpose: str, message_bytes: int) -> None:
        """An all-reduce over nodes that are jobs of their own."""
        if jobs > 1:
            self.sent["inter_node", purpose] += all_reduce_bytes(jobs, message_bytes)


def gather_traffic(a: Arrangement, rank: int) -> Traffic:
    """Gathering the whole base once."""
    links = Links(a.topology, rank)
    if a.engine_ranks > 1:
        group = links.world if a.engine_ranks == a.topology.world_size else links.node
        for unit in a.units().values():
            links.all_gather(group, "base", unit // a.engine_ranks)
    return links.sent


def gradient_traffic(a: Arrangement, rank: int) -> Traffic:
    """Averaging the gradients of a head that several ranks share (or all), every step."""
    links = Links(a.topology, rank)
    group = links.world if a.config.optimizer.average == "all" else links.head
    links.all_reduce(group, "head_gradient", FP32 * a.shapes.trainable_values)
    return links.sent


def step_traffic(a: Arrangement, rank: int) -> Traffic:
    """An optimizer step; with `base.gather: window` one whose base is gathered already."""
    passes = 0 if a.config.base.gather == "window" else 2 * a.config.train.accumulate
    return times(gather_traffic(a, rank), passes) + gradient_traffic(a, rank)


def merge_traffic(a: Arrangement, rank: int, *, everywhere: bool) -> Traffic:
    """A merge of all heads of a node, or (`everywhere`) of all nodes; purposes as in `merge` and `replicas`."""
    fragments = range(a.cadence.fragments)
    if not everywhere:
        return _in_node(a, rank, fragments, replicas=True)
    return sum((fragment_traffic(a, rank, fragment) for fragment in fragments), Traffic())


def fragment_traffic(a: Arrangement, rank: int, fragment: int) -> Traffic:
    """What a merge of all nodes sends for one fragment; the replica parameters go with fragment 0."""
    sets = {fragment: a.merges_sent}
    if not a.cadence.delay:
        return _at_once(a, rank, sets)
    return _in_node(a, rank, sets, replicas=fragment == 0) + _landing(a, rank, sets)


def _in_node(a: Arrangement, rank: int, fragments: Container[int], *, replicas: bool) -> Traffic:
    """A merge inside the nodes."""
    links = Links(a.topology, rank)
    for bucket in a.buckets:
        if bucket.fragment in fragments:
            _gather_factors(a, links, bucket)
    if replicas:
        _scatter_replicas(a, links)
        _gather_replicas(a, links)
    return links.sent


def region_traffic(a: Arrangement, rank: int, fragments: Container[int], *, replicas: bool) -> Traffic:
    """What a merge inside the regions sends besides that inside the nodes."""
    links = Links(a.topology, rank)
    for bucket in a.buckets:
        if bucket.fragment in fragments:
            _dense_traffic(a, links, bucket, regional=True)
    if replicas:
        links.all_reduce(links.region, "merge_region", FP32 * a.replica_part)
    return links.sent


def _at_once(a: Arrangement, rank: int, sets: Mapping[int, int]) -> Traffic:
    """A merge of all nodes without delay, of fragments with so many sets of factors."""
    links = Links(a.topology, rank)
    for bucket in a.buckets:
        if bucket.path == "dense" and bucket.fragment in sets:
            _gather_factors(a, links, bucket)
    if 0 in sets:
        _scatter_replicas(a, links)
    return links.sent + _landing(a, rank, sets)


def _landing(a: Arrangement, rank: int, sets: Mapping[int, int]) -> Traffic:
    """What crosses between nodes, and its way inside them."""
    links, t = Links(a.topology, rank), a.topology
    if 0 in sets and a.config.fault_tolerance.enabled:
        _between_jobs(a, links)
    for bucket in a.buckets:
        if bucket.fragment not in sets:
            continue
        if bucket.path == "factor":
            of_head = sum(codec.size(n) for codec, n in zip(a.factor_codecs, a.head_parts(bucket), strict=True))
            part = (1 if a.resetless else sets[bucket.fragment]) * t.heads_per_rank * of_head
            links.all_gather(links.peers, "merge_factor", part)
            links.all_gather(links.node, "merge_factor", part * t.nodes)
        else:
            _dense_traffic(a, links, bucket)
        if a.refined:
            links.all_gather(links.peers, "merge_refresh", a.codec.size(a.padded_parts(bucket, rank)))
    if 0 in sets:
        values = a.replica_part
        if a.codec.exact:
            links.all_reduce(links.peers, "merge_replica", FP32 * values)
        else:
            _mean_traffic(links, links.peers, a.codec, "merge_replica", -(-values // t.nodes), shared=True)
        _gather_replicas(a, links)
        if t.nodes > 1:
            links.all_gather(links.peers, "merge_check", FINGERPRINT)
    return links.sent


def _between_jobs(a: Arrangement, links: Links) -> None:
    jobs = a.topology.all_nodes
    for bucket in a.buckets:
        links.between_jobs(jobs, "merge_dense", FP32 * a.formed(bucket, links.topology.rank))
    links.between_jobs(jobs, "merge_replica", FP32 * a.replica_part)
    links.between_jobs(jobs, "merge_check", CONFIGURED)
    links.between_jobs(jobs, "merge_check", ROLL_CALL * jobs)


def _gather_factors(a: Arrangement, links: Links, bucket: Bucket) -> None:
    links.all_gather(links.node, "merge_factor", FP32 * a.topology.heads_per_rank * sum(a.head_parts(bucket)))


def _scatter_replicas(a: Arrangement, links: Links) -> None:
    links.reduce_scatter(links.node, "merge_replica", FP32 * a.replica_part * a.topology.ranks_per_node)


def _gather_replicas(a: Arrangement, links: Links) -> None:
    links.all_gather(links.node, "merge_replica", FP32 * a.replica_part)


def _dense_traffic(a: Arrangement, links: Links, bucket: Bucket, *, regional: bool = False) -> None:
    """`dense.DenseExchange`."""
    group, codec, purpose = links.peers, a.codec, "merge_dense"
    if regional:
        group, codec, purpose = links.region, a.region_codec, "merge_region"
    rank = links.topology.rank
    padded = a.padded_parts(bucket, rank, regional=regional)
    if not codec.exact:
        _mean_traffic(links, group, codec, purpose, padded, shared=not a.spread)
    elif a.spread:
        links.reduce_scatter(group, purpose, FP32 * len(group) * padded)
    else:
        links.all_reduce(group, purpose, FP32 * a.formed(bucket, rank))


def _mean_traffic(links: Links, group: Sequence[int], codec: Codec, purpose: str, values: int, *, shared: bool) -> None:
    """`feedback.MeanWithFeedback` of rows of so many values."""
    part = codec.size(values)
    links.all_to_all(group, purpose, part * len(group))
    if shared:
        links.all_gather(group, purpose, part)


def run_traffic(a: Arrangement, rank: int, steps: int, *, begun: int = 0, last: bool = False) -> Traffic:
    """The optimizer steps from `begun` to `steps` of a run with their merges; evaluations and checkpoints not counted.

    `last`: the run ends there, and all that is left is merged.
    """
    sent = times(step_traffic(a, rank), steps - begun)
    for step in filter(a.cadence.due, range(begun + 1, steps + 1)):
        sent += _traffic_after(a, rank, step, last=last and step == steps)
    if a.config.base.gather == "window":  # before the first step, and after every merge that a step follows
        gathers = sum(step == 0 or a.cadence.due(step) for step in range(begun, steps))
        sent += times(gather_traffic(a, rank), gathers)
    return sent


def window_traffic(a: Arrangement, rank: int) -> Traffic:
    """`merge.every` steps with their merges, in the middle of a run: as much is under way at their end as before."""
    every = a.cadence.every
    return run_traffic(a, rank, 3 * every, begun=2 * every)


def _traffic_after(a: Arrangement, rank: int, step: int, *, last: bool) -> Traffic:
    """The merges after `step`; what is under way counts where it lands."""
    cadence = a.cadence
    departing, sent = cadence.sets_sent(step, last=last), Traffic()
    if cadence.takes_time(step) and cadence.lands(step) is not None:
        sent += _landing(a, rank, cadence.sets_sent(step - cadence.delay))
    elsewhere = [f for f in range(cadence.fragments) if f not in departing] if cadence.is_local(step) else []
    if cadence.is_regional(step):
        sent += region_traffic(a, rank, elsewhere, replicas=0 in elsewhere)
    if last or not cadence.takes_time(step):
        sent += _at_once(a, rank, departing)
        departing = {}
    return sent + _in_node(a, rank, [*elsewhere, *departing], replicas=0 in [*elsewhere, *departing])


def times(traffic: Traffic, count: int) -> Traffic:
    return Traffic({key: sent * count for key, sent in traffic.items()})


def by_scope(traffic: Traffic) -> dict[Scope, int]:
    """The sum over purposes."""
    return {scope: sum(sent for (of, _), sent in traffic.items() if of == scope) for scope in SCOPES}


def of_node(a: Arrangement, per_rank: Callable[[Arrangement, int], Traffic]) -> Traffic:
    """The sum over the ranks of a node; nodes do not differ."""
    total = Traffic()
    for rank in a.topology.node_ranks(0):
        total += per_rank(a, rank)
    return total
