"""Whether nodes hold the same masters: a sum of bits each, compared at every global merge."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lte_scale.topology import Topology


class Disagreement(RuntimeError):
    """Masters that must be equal are not: memory, a link or an accelerator has changed bits."""


def fingerprint(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of the bits of fp32 tensors as int32 numbers [1], int64: one changed bit changes it."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64).to(device) for tensor in tensors]
    return torch.stack(sums).sum().view(1)


def check(prints: Tensor, topology: Topology) -> None:
    """Compare the fingerprints of this rank's peers [nodes].

    Raises:
        Disagreement: naming the ranks whose masters are not those of most (all of them, where there is no majority).
    """
    values = prints.flatten().tolist()
    if len(set(values)) == 1:
        return
    ranks = topology.peer_ranks(topology.local_rank)
    most = max(set(values), key=values.count)
    if 2 * values.count(most) > len(values):
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != most]
        word = f"the masters of rank {', '.join(map(str, odd))} are not those of the other nodes"
    else:
        word = f"the masters of ranks {', '.join(map(str, ranks))} are not equal, as they must be"
    raise Disagreement(
        f"{word}: bits have changed in memory or on the way; exclude the node and resume from a checkpoint before"
    )
