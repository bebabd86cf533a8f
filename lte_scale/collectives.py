"""Every collective of the project, counting the bytes each rank sends by scope and purpose.

Bytes are those of ring algorithms over ranks in node order, which NCCL and gloo use for large messages: a rank
sends to its successor in the group, so the bytes are *inter-node* when that successor is on another node.
Summed over a node's ranks this is what leaves its network interface (plus the headers of the protocol).
In an all-to-all a rank sends to every other one: that is counted the same way, by where the successor is, and exact
among peers, all of which are on other nodes.

A group of one is the identity: nothing is sent, nothing is copied, no process group is needed.

Every call is also timed, and noted while it lasts, so that a rank that waits for ever can say for whom.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from lte_scale.timing import Stopwatch
from lte_scale.topology import Topology

# By the names that 2.14 gave them; builds just before it, as NVIDIA's, have the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")
Scope = Literal["inter_node", "intra_node"]
SCOPES: tuple[Scope, ...] = ("inter_node", "intra_node")
PURPOSES = (
    "base",  # gathering base weights for forward and backward
    "head_gradient",  # averaging over the ranks that share a head
    "merge_factor",
    "merge_dense",
    "merge_replica",
    "merge_region",  # weights and replica parameters among the nodes of a region
    "merge_refresh",  # masters to the node's compute copies
    "merge_check",  # whether the nodes hold the same masters
    "merge_wait",  # for an exchange that began earlier and has not arrived
    "evaluate",
    "metrics",
    "control",  # agreeing when to stop
)


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks that communicate, and the scope of the link from this rank to the next one in the ring."""

    ranks: tuple[int, ...]
    scope: Scope
    process_group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class Call:
    """A collective that this rank has entered: the `number`-th one in a group of these `ranks`."""

    purpose: str
    ranks: tuple[int, ...]
    number: int


def all_reduce_bytes(size: int, message_bytes: int) -> int:
    """Bytes one rank sends in a ring all-reduce of a message over `size` ranks."""
    return 2 * (size - 1) * message_bytes // size


def reduce_scatter_bytes(size: int, message_bytes: int) -> int:
    """Bytes one rank sends in a ring reduce-scatter of a message (all `size` parts together)."""
    return (size - 1) * message_bytes // size


def all_to_all_bytes(size: int, message_bytes: int) -> int:
    """Bytes one rank sends in an all-to-all of a message with a part for each of `size` ranks: all but its own."""
    return (size - 1) * message_bytes // size


def all_gather_bytes(size: int, part_bytes: int) -> int:
    """Bytes one rank sends in a ring all-gather of one part from each of `size` ranks."""
    return (size - 1) * part_bytes


class Collectives:
    """The process groups of a topology and the collectives over them.

    Attributes:
        node: the ranks of this node.
        peers: the ranks with this local rank on every node.
        region: those of them in this region; this rank alone where there are none.
        head: the ranks that share this rank's head.
        world: all ranks.
        bytes_sent: bytes this rank has sent, by (scope, purpose).
        clock: time in collectives, by (scope, purpose).
        entered: how many collectives this rank has entered in each group, by its ranks.
        last: the collective it entered last, and `inside` whether it is still there.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout_seconds: float = 600.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        """Collective where torch.distributed is initialised: every rank creates every group, in the same order.

        Groups that FSDP shards over exist even for one rank, since FSDP needs a process group.
        """
        self.topology = topology
        self.bytes_sent: Counter[tuple[Scope, str]] = Counter()
        self.clock: Stopwatch[tuple[Scope, str]] = Stopwatch(device)
        self.entered: Counter[tuple[int, ...]] = Counter()
        self.last: Call | None = None
        self.inside = False
        t, self._timeout = topology, timedelta(seconds=timeout_seconds)
        self.world = self._group([list(range(t.world_size))], sharding=True)
        self.node = self._group([t.node_ranks(node) for node in range(t.nodes)], sharding=True)
        self.peers = self._group_of_peers()
        first_nodes = range(0, t.nodes, t.region_size)
        self.region = self._group([t.region_peers(n, local) for n in first_nodes for local in range(t.ranks_per_node)])
        groups = t.ranks_per_node // t.ranks_per_head
        self.head = self._group([t.head_ranks(n, g) for n in range(t.nodes) for g in range(groups)])

    def aside(self) -> Collectives:
        """The same ranks with a group of peers, counts and a clock of its own, for one thread beside this one.

        Collective. What it sends is counted here when it is handed to `absorb`.
        """
        other = copy.copy(self)
        other.bytes_sent, other.entered, other.clock = Counter(), Counter(), Stopwatch(torch.device("cpu"))
        other.peers = self._group_of_peers()
        return other

    def absorb(self, other: Collectives) -> None:
        """Count what `other` has sent as sent by this one."""
        if other is not self:
            self.bytes_sent.update(other.bytes_sent)
            other.bytes_sent.clear()

    def _group_of_peers(self) -> Group:
        return self._group([self.topology.peer_ranks(local) for local in range(self.topology.ranks_per_node)])

    def _group(self, partition: Sequence[Sequence[int]], *, sharding: bool = False) -> Group:
        topology = self.topology
        mine = next(tuple(ranks) for ranks in partition if topology.rank in ranks)
        process_group = None
        if dist.is_initialized() and len(mine) > (0 if sharding else 1):
            for ranks in partition:
                created = cast("dist.ProcessGroup", dist.new_group(list(ranks), timeout=self._timeout))
                if tuple(ranks) == mine:
                    process_group = created
        successor = mine[(mine.index(topology.rank) + 1) % len(mine)]
        same_node = successor // topology.ranks_per_node == topology.node
        return Group(mine, "intra_node" if same_node else "inter_node", process_group)

    @contextmanager
    def call(self, group: Group, purpose: str, sent: int) -> Iterator[None]:
        """Around a collective: counts the bytes this rank sends to its successor in the group, times it, notes it."""
        if sent:
            self.bytes_sent[group.scope, purpose] += sent
        self.entered[group.ranks] += 1
        self.last, self.inside = Call(purpose, group.ranks, self.entered[group.ranks]), True
        with self.clock((group.scope, purpose)):
            yield
        self.inside = False

    def node_bytes(self) -> dict[tuple[Scope, str], int]:
        """Bytes that the ranks of this node have sent so far, by (scope, purpose). Collective in the node."""
        keys = [(scope, purpose) for scope in SCOPES for purpose in PURPOSES]
        counts = torch.tensor([self.bytes_sent[key] for key in keys])
        if self.node.size > 1:
            with self.call(self.node, "metrics", 0):
                dist.all_reduce(counts, group=self.node.process_group)
        return dict(zip(keys, counts.tolist(), strict=True))

    def all_reduce(self, tensor: Tensor, group: Group, purpose: str, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) over the group, in place."""
        if group.size > 1:
            operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            with self.call(group, purpose, all_reduce_bytes(group.size, tensor.nbytes)):
                dist.all_reduce(tensor, operation, group=group.process_group)
        return tensor

    def begin_all_reduce(self, tensor: Tensor, group: Group, purpose: str) -> Callable[[], None]:
        """Begin to sum over a group of several, in place. Returns what waits for it, where alone time is counted."""
        self.bytes_sent[group.scope, purpose] += all_reduce_bytes(group.size, tensor.nbytes)
        work = dist.all_reduce(tensor, group=group.process_group, async_op=True)
        assert work is not None

        def wait() -> None:
            with self.call(group, purpose, 0):
                work.wait()

        return wait

    def all_gather(self, tensor: Tensor, group: Group, purpose: str) -> Tensor:
        """`tensor` [...] of every rank, as [ranks, ...] in the order of the group."""
        if group.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((group.size * tensor.numel(),))
        with self.call(group, purpose, all_gather_bytes(group.size, tensor.nbytes)):
            all_gather_single(gathered, tensor.contiguous().view(-1), group=group.process_group)
        return gathered.view(group.size, *tensor.shape)

    def reduce_scatter(self, tensor: Tensor, group: Group, purpose: str) -> Tensor:
        """The sum over the group of row `index in the group` of `tensor` [ranks, ...], as [...]."""
        if group.size == 1:
            return tensor[0]
        if tensor.device.type == "cpu":  # gloo's own sends what an all-reduce does, twice as much
            return self.all_to_all(tensor, group, purpose).sum(0)
        part = tensor.new_empty((tensor[0].numel(),))
        with self.call(group, purpose, reduce_scatter_bytes(group.size, tensor.nbytes)):
            _reduce_scatter(part, tensor.contiguous().view(-1), group=group.process_group)
        return part.view(tensor.shape[1:])

    def all_to_all(self, tensor: Tensor, group: Group, purpose: str) -> Tensor:
        """Row `index in the group` of every rank's `tensor` [ranks, ...], as [ranks, ...] in the order of the group."""
        if group.size == 1:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        with self.call(group, purpose, all_to_all_bytes(group.size, tensor.nbytes)):
            dist.all_to_all_single(received, tensor.contiguous(), group=group.process_group)
        return received

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world.size > 1:
            with self.call(self.world, "control", 0):
                dist.barrier(self.world.process_group)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value` on every rank (small control data)."""
        box = [value]
        if self.world.size > 1:
            with self.call(self.world, "control", 0):
                dist.broadcast_object_list(box, src=0, group=self.world.process_group)
        return box[0]

    def counted_all_gather(self, group: Group, purpose: str) -> AllGather:
        """An all-gather for FSDP to call in place of its own, so that its bytes are counted here too."""
        return _CountedAllGather(self, group, purpose)


class _CountedAllGather(AllGather):
    def __init__(self, collectives: Collectives, group: Group, purpose: str) -> None:
        self.collectives, self.group, self.purpose = collectives, group, purpose

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if self.group.size == 1:
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        with self.collectives.call(self.group, self.purpose, all_gather_bytes(self.group.size, input_tensor.nbytes)):
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
