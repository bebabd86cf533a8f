"""Initial values that depend on names and seeds alone, so that every sharding starts from the same weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_ROWS_PER_BLOCK = 256


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and run."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def base_slice(name: str, shape: tuple[int, int], start: int, stop: int, *, std: float, seed: int) -> Tensor:
    """Elements [start, stop) of the row-major flattened initial weight `name` [O, I]: truncated normal, fp32, CPU.

    Drawn in blocks of rows with a seed each, so that a rank computes little more than the part it owns.
    """
    rows, columns = shape
    block = _ROWS_PER_BLOCK
    first, last = start // columns // block, math.ceil(stop / columns / block)
    if start >= stop:
        return torch.empty(0)
    blocks = []
    for number in range(first, last):
        values = torch.empty(min(block, rows - number * block), columns)
        torch.nn.init.trunc_normal_(
            values, std=std, a=-2 * std, b=2 * std, generator=generator("base", name, number, seed)
        )
        blocks.append(values.view(-1))
    offset = first * block * columns
    return torch.cat(blocks)[start - offset : stop - offset].clone()


def orthogonal_factor(name: str, rank: int, into: int, head: int, *, seed: int) -> Tensor:
    """A_n [rank, into] of global head `head`: semi-orthogonal rows times sqrt(into / rank), other for every head."""
    values = torch.empty(rank, into)
    torch.nn.init.orthogonal_(values, gain=math.sqrt(into / rank), generator=generator("A", name, head, seed))
    return values
