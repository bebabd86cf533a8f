"""How factors travel: two all-gathers bring them to the ranks that need them, which form their parts of the product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.collectives import Collectives
from lte_scale.engines.base import Slice
from lte_scale.model import Heads


class FactorExchange:
    """Brings the factors of a bucket's weights from every head of a node, or of all nodes, to this rank.

    Heads travel as flat vectors [A | B | A | B ...]. Ranks that share a head send a part each.
    """

    def __init__(self, heads: Heads, collectives: Collectives, purpose: str = "merge_factor") -> None:
        self.heads, self.collectives, self.topology = heads, collectives, collectives.topology
        self.purpose = purpose

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
        return self._spread(collectives.all_gather(packed, collectives.peers, self.purpose), size)

    def _spread(self, packed_KLHC: Tensor, size: int) -> Tensor:
        nodes, stack, heads, part = packed_KLHC.shape
        gathered = self.collectives.all_gather(packed_KLHC, self.collectives.node, self.purpose)
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
