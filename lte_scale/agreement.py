"""Whether nodes hold the same masters: a sum of bits each, compared at every global merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Disagreement(RuntimeError):
    """Masters that must be equal are not: memory, a link or an accelerator has changed bits."""


def fingerprint(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of the bits of fp32 tensors as int32 numbers [1], int64: one changed bit changes it."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64).to(device) for tensor in tensors]
    return torch.stack(sums).sum().view(1)


def strays(prints: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The ranks whose fingerprints are not those of most: all of them, where there is no majority."""
    most = max(set(prints), key=prints.count)
    if 2 * prints.count(most) <= len(prints):
        return list(ranks)
    return [rank for rank, value in zip(ranks, prints, strict=True) if value != most]


def check(prints: Sequence[int], ranks: Sequence[int]) -> None:
    """Compare the fingerprints of these ranks, which hold the same parts of the masters.

    Raises:
        Disagreement: naming the ranks whose masters are not those of most (all of them, where there is no majority).
    """
    odd = strays(prints, ranks)
    if not odd:
        return
    names = ", ".join(map(str, odd))
    if len(odd) < len(ranks):
        word = f"the masters of rank {names} are not those of the other nodes"
    else:
        word = f"the masters of ranks {names} are not equal, as they must be"
    raise Disagreement(
        f"{word}: bits have changed in memory or on the way; exclude the node and resume from a checkpoint before"
    )
