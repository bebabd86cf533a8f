"""How factors travel: two all-gathers bring them to the ranks that need them, which form their parts of the product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.codec import Codec
from lte_scale.collectives import Collectives
from lte_scale.engines.base import Slice
from lte_scale.model import Heads


class Factors(NamedTuple):
    """The factors of some weights of any number of heads, each head's A (and B) of all these weights as one row."""

    A: Tensor
    B: Tensor


class FactorExchange:
    """Brings the factors of a bucket's weights from every head of a node, or of all nodes, to this rank.

    Heads travel as flat vectors [A A ... | B B ...]. Ranks that share a head send a part of both each. Between nodes
    they are what `codecs` (of A and of B) make of them.
    """

    def __init__(
        self,
        heads: Heads,
        collectives: Collectives,
        purpose: str = "merge_factor",
        codecs: tuple[Codec, Codec] = (Codec(), Codec()),
        link: Collectives | None = None,
    ) -> None:
        """`link`: the collectives between nodes, where they are others than those inside."""
        self.heads, self.collectives, self.topology = heads, collectives, collectives.topology
        self.link = link or collectives
        self.purpose, self.codecs = purpose, codecs
        self.exact = all(codec.exact for codec in codecs)

    @property
    def device(self) -> torch.device:
        """Where messages are formed: that of the factors, also if the weights are offloaded."""
        return next(iter(self.heads.parameters().values())).device

    def sizes(self, names: Sequence[str]) -> tuple[int, int]:
        """Values of A and of B of one head."""
        layers = [self.heads.linears[name] for name in names]
        return sum(layer.A[0].numel() for layer in layers), sum(layer.B[0].numel() for layer in layers)

    def _parts(self, names: Sequence[str]) -> list[int]:
        """Values of A and of B that one of the ranks sharing a head sends."""
        return [-(-size // self.topology.ranks_per_head) for size in self.sizes(names)]

    def pack(self, names: Sequence[str], *, previous: bool = False) -> Tensor:
        """This rank's part of its heads' factors [H, c]; `previous` takes those of the last merge."""
        layers = [self.heads.linears[name] for name in names]
        members, member = self.topology.ranks_per_head, self.topology.head_member
        packed = []
        for factor, part in zip(("A", "B"), self._parts(names), strict=True):
            tensors = [getattr(layer, f"{factor}_prev" if previous else factor).detach() for layer in layers]
            flat_HC = torch.cat([tensor.flatten(1) for tensor in tensors], 1)
            flat_HC = F.pad(flat_HC, (0, part * members - flat_HC.shape[1]))
            packed.append(flat_HC[:, member * part : (member + 1) * part])
        return torch.cat(packed, 1)

    def rounded(self, packed: Tensor, names: Sequence[str]) -> Tensor:
        """What is left of `packed` [..., c] between nodes; the same again, if it is so already."""
        return packed if self.exact else self._decoded(self._encoded(packed, names), names)

    def within_node(self, packed: Tensor, names: Sequence[str]) -> Factors:
        """[H, c] of every rank of the node as Factors [h, values], heads in the order of their ids."""
        A, B = self._spread(self.collectives.all_gather(packed[None, None], self.collectives.node, self.purpose), names)
        return Factors(A[0, 0], B[0, 0])

    def between_nodes(self, packed: Tensor, names: Sequence[str]) -> Factors:
        """[L, H, c] of every rank as Factors [K, L, h, values]: over the slow link once, then inside the node."""
        return self.received(self.over_link(packed, names), names)

    def over_link(self, packed: Tensor, names: Sequence[str]) -> Tensor:
        """What the peers of this rank send of their `packed` [L, H, c]: [K, L, H, bytes or values]."""
        message = packed if self.exact else self._encoded(packed, names)
        return self.link.all_gather(message, self.link.peers, self.purpose)

    def received(self, messages: Tensor, names: Sequence[str]) -> Factors:
        """What arrived at all ranks of the node, as Factors [K, L, h, values]."""
        message = self.collectives.all_gather(messages, self.collectives.node, self.purpose)
        return self._spread(message if self.exact else self._decoded(message, names), names)

    def _encoded(self, packed: Tensor, names: Sequence[str]) -> Tensor:
        parts = packed.split(self._parts(names), -1)
        return torch.cat([codec.encode(part) for codec, part in zip(self.codecs, parts, strict=True)], -1)

    def _decoded(self, message: Tensor, names: Sequence[str]) -> Tensor:
        coded = [(codec, n) for codec, n in zip(self.codecs, self._parts(names), strict=True)]
        parts = message.split([codec.size(n) for codec, n in coded], -1)
        return torch.cat([codec.decode(part, n) for (codec, n), part in zip(coded, parts, strict=True)], -1)

    def _spread(self, gathered_GKLHC: Tensor, names: Sequence[str]) -> Factors:
        nodes, stack = gathered_GKLHC.shape[1:3]
        members = self.topology.ranks_per_head
        split = gathered_GKLHC.unflatten(0, (-1, members)).permute(2, 3, 0, 4, 1, 5)
        A, B = (
            part.reshape(nodes, stack, -1, members * part.shape[-1])[..., :size]
            for part, size in zip(split.split(self._parts(names), -1), self.sizes(names), strict=True)
        )
        return Factors(A, B)


def product(factors: Factors, shape: tuple[int, int], rank: int, parts: Sequence[Slice], scale: float) -> list[Tensor]:
    """Flat `parts` of `scale * sum over heads of B A` of one weight; never more than the rows they touch.

    Args:
        factors: of this weight alone, of any number of heads [..., R I] and [..., O R].
    """
    out, into = shape
    A_SI = factors.A.reshape(-1, into)
    B_HOR = factors.B.reshape(-1, out, rank)
    formed = []
    for start, stop in parts:
        first, last = start // into, math.ceil(stop / into)
        B_OS = B_HOR[:, first:last].permute(1, 0, 2).reshape(last - first, len(A_SI))
        rows = (scale * B_OS) @ A_SI
        formed.append(rows.view(-1)[start - first * into : stop - first * into])
    return formed
