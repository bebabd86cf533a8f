"""Which bytes a merge moves: what every rank owns, which path a weight takes, and how factors travel.

Pure arithmetic first (`Ownership`, `choose_path`); then `FactorExchange`, the two all-gathers that bring factors to
the ranks that need them. Values per weight [O, I], rank R, h heads per node, K nodes, G ranks per node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.collectives import Collectives
from lte_scale.model import Heads
from lte_scale.topology import Topology

Path = Literal["factor", "dense"]
Slice = tuple[int, int]


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


def split_evenly(part: Slice, count: int) -> tuple[Slice, ...]:
    """`part` in `count` slices of equal length, the last ones shorter or empty."""
    start, stop = part
    size = -(-(stop - start) // count)
    return tuple((min(start + i * size, stop), min(start + (i + 1) * size, stop)) for i in range(count))


def choose_path(
    shape: tuple[int, int], rank: int, topology: Topology, *, scope: str, merges_per_window: int, asked: str
) -> Path:
    """The path that sends fewer bytes between nodes for one weight, or the one asked for.

    Per node and merge the factor path sends (K - 1) * merges * h * R * (in + out) values, the dense path
    2 (K - 1) / K * in * out with scope `node` and half of that with scope `global` (DESIGN, section 3).
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


class FactorExchange:
    """Brings the factors of a bucket's weights from every head of a node, or of all nodes, to this rank.

    Heads travel as flat vectors [A | B | A | B ...]. Ranks that share a head send a part each.
    """

    def __init__(self, heads: Heads, collectives: Collectives) -> None:
        self.heads, self.collectives, self.topology = heads, collectives, collectives.topology

    @property
    def device(self) -> torch.device:
        """Where messages are formed: that of the factors, also if the weights are offloaded."""
        return next(iter(self.heads.linears.values())).A.device

    def size(self, names: Sequence[str]) -> int:
        """Values of one head."""
        return sum(self.heads.linears[n].A[0].numel() + self.heads.linears[n].B[0].numel() for n in names)

    def pack(self, names: Sequence[str], *, previous: bool = False) -> Tensor:
        """This rank's part of its heads' factors [H, c]; `previous` takes those of the last merge."""
        layers = [self.heads.linears[name] for name in names]
        tensors = [t for layer in layers for t in ((layer.A_prev, layer.B_prev) if previous else (layer.A, layer.B))]
        flat_HC = torch.cat([t.detach().flatten(1) for t in tensors if t is not None], 1)
        members = self.topology.ranks_per_head
        part = -(-flat_HC.shape[1] // members)
        flat_HC = F.pad(flat_HC, (0, part * members - flat_HC.shape[1]))
        member = self.topology.head_member
        return flat_HC[:, member * part : (member + 1) * part]

    def within_node(self, packed: Tensor, size: int) -> Tensor:
        """[L, H, c] of every rank of the node as [L, h, size], heads in the order of their ids."""
        return self._spread(packed.unsqueeze(0), size)[0]

    def between_nodes(self, packed: Tensor, size: int) -> Tensor:
        """[L, H, c] of every rank as [K, L, h, size]: over the slow link once, then inside the node."""
        collectives = self.collectives
        return self._spread(collectives.all_gather(packed, collectives.peers, "merge_factor"), size)

    def _spread(self, packed_KLHC: Tensor, size: int) -> Tensor:
        nodes, stack, heads, part = packed_KLHC.shape
        gathered = self.collectives.all_gather(packed_KLHC, self.collectives.node, "merge_factor")
        members = self.topology.ranks_per_head
        split = gathered.view(-1, members, nodes, stack, heads, part).permute(2, 3, 0, 4, 1, 5)
        return split.reshape(nodes, stack, -1, members * part)[..., :size]


def product(
    factors: Tensor, offset: int, shape: tuple[int, int], rank: int, parts: Sequence[Slice], scale: float
) -> list[Tensor]:
    """Flat `parts` of `scale * sum over heads of B A` of one weight; never more than the rows they touch.

    Args:
        factors: [..., C] flat factors of any number of heads, A at `offset` and B after it.
    """
    out, into = shape
    flat = factors.reshape(-1, factors.shape[-1])
    heads = flat.shape[0]
    middle, end = offset + rank * into, offset + rank * (into + out)
    A_SI = flat[:, offset:middle].reshape(heads * rank, into)
    B_HOR = flat[:, middle:end].reshape(heads, out, rank)
    formed = []
    for start, stop in parts:
        first, last = start // into, math.ceil(stop / into)
        B_OS = B_HOR[:, first:last].permute(1, 0, 2).reshape(last - first, heads * rank)
        rows = (scale * B_OS) @ A_SI
        formed.append(rows.view(-1)[start - first * into : stop - first * into])
    return formed
