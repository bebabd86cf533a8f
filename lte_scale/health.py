"""The health of the heads of a node: how much each has learned since the last merge, and whether it is the same.

With D_n = s (B_n A_n - B'_n A'_n) of one weight (B' and A' are zero in reset mode), all figures come from the small
matrices of inner products of the factors, [h R', h R'] for h heads: no product of the size of a weight is formed.

    <D_m, D_n> = s^2 sum over elements of (B_m^T B_n) * (A_m A_n^T)
    effective rank of D = sum_n D_n / h:  (sum of sigma^2)^2 / sum of sigma^4 = |D|^4 / |D D^T|^2, the participation
    ratio of the squared singular values; 1 if one direction has it all, the rank if all have the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte_scale.collectives import Collectives
from lte_scale.exchange import FactorExchange
from lte_scale.model import Heads

SAMPLED_LAYERS = 4
COMPARED_HEADS = 16


@dataclass(frozen=True, slots=True)
class Health:
    """Of all heads of the node, or of the first 16.

    Attributes:
        delta_norms: Frobenius norm of each head's delta over the sampled layers.
        cosine_mean, cosine_max: over pairs of heads; None for a single head.
        effective_rank: of the mean of the heads' deltas; a mean over the sampled layers.
        rank_ratio: the same over the rank that as many factors can reach at most.
    """

    delta_norms: list[float]
    cosine_mean: float | None
    cosine_max: float | None
    effective_rank: float
    rank_ratio: float


class HeadHealth:
    """Measures a few layers, spread over the depth of the model."""

    def __init__(self, heads: Heads, collectives: Collectives) -> None:
        self.heads = heads
        self.exchange = FactorExchange(heads, collectives, purpose="metrics")
        names = list(heads.linears)
        count = min(SAMPLED_LAYERS, len(names))
        self.layers = [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]

    @torch.no_grad()
    def measure(self) -> Health:
        """Just before a merge. Collective in the node."""
        with torch.autocast(self.exchange.device.type, enabled=False):
            inner = torch.zeros((), dtype=torch.float64)
            ranks, ratios = [], []
            for name in self.layers:
                A_hRI, B_hOR = self._factors(name)
                AA_SS, BB_SS = grams(A_hRI, B_hOR)
                inner = inner + inner_products(AA_SS, BB_SS, len(A_hRI)) * self.heads.linears[name].scale ** 2
                rank = effective_rank(AA_SS, BB_SS)
                reachable = min(A_hRI.shape[0] * A_hRI.shape[1], A_hRI.shape[2], B_hOR.shape[1])
                ranks.append(rank)
                ratios.append(rank / reachable)
        norms = inner.diagonal().clamp(min=0).sqrt()
        pairs = ~torch.eye(len(norms), dtype=torch.bool)
        cosines = (inner / (norms.unsqueeze(1) * norms).clamp(min=1e-30))[pairs]
        return Health(
            norms.tolist(),
            cosines.mean().item() if len(cosines) else None,
            cosines.max().item() if len(cosines) else None,
            sum(ranks) / len(ranks),
            sum(ratios) / len(ratios),
        )

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [h, R', I] and B [h, O, R'] of the node's heads, so that a head's delta is s B A."""
        layer = self.heads.linears[name]
        (rank, into), out = layer.A.shape[1:], layer.B.shape[1]

        def gathered(previous: bool) -> tuple[Tensor, Tensor]:
            packed = self.exchange.pack([name], previous=previous)
            A, B = (factor[:COMPARED_HEADS].double().cpu() for factor in self.exchange.within_node(packed, [name]))
            return A.view(-1, rank, into), B.view(-1, out, rank)

        A, B = gathered(previous=False)
        if layer.A_prev is None:
            return A, B
        A_prev, B_prev = gathered(previous=True)
        return torch.cat((A, A_prev), 1), torch.cat((B, -B_prev), 2)


def grams(A_hRI: Tensor, B_hOR: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of all heads' rows of A, and of their columns of B [hR, hR]."""
    heads, rank, into = A_hRI.shape
    A_SI = A_hRI.reshape(heads * rank, into)
    B_OS = B_hOR.transpose(0, 1).reshape(-1, heads * rank)
    return A_SI @ A_SI.T, B_OS.T @ B_OS


def inner_products(AA_SS: Tensor, BB_SS: Tensor, heads: int) -> Tensor:
    """Of the heads' B A [h, h]."""
    rank = len(AA_SS) // heads
    return (AA_SS * BB_SS).view(heads, rank, heads, rank).sum((1, 3))


def effective_rank(AA_SS: Tensor, BB_SS: Tensor) -> float:
    """Of the sum of the heads' B A; 0 if it is zero."""
    M_SS = AA_SS @ BB_SS  # its eigenvalues are the squared singular values
    fourth = (M_SS * M_SS.T).sum().item()
    return M_SS.trace().item() ** 2 / fourth if fourth > 0 else 0.0
