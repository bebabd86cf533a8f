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
    """A_n [rank, into] of global head `head`: orthonormal rows times sqrt(into / rank), other for every head.

    Heads take the rows of one random basis after another, so that sum_n A_n^T A_n is close to a multiple of the
    identity: a merge sees every input direction about as often. Of independent draws some are seen by many heads and
    others by none, and a merge is that much further from the gradient (docs/LOG.md, 2026-11-27).
    """
    parts, row, stop = [], head * rank, (head + 1) * rank
    while row < stop:
        number, start = divmod(row, into)
        end = min(into, start + stop - row)
        parts.append(_basis_rows(into, start, end, generator("A", name, number, seed)))
        row += end - start
    rows = torch.cat(parts)
    if len(parts) > 1:  # rows of two bases are nearly orthogonal: take the nearest that are
        left, _, right = torch.linalg.svd(rows, full_matrices=False)
        rows = left @ right
    return (rows * math.sqrt(into / rank)).float()


def _basis_rows(into: int, start: int, stop: int, random: torch.Generator) -> Tensor:
    """Rows [start, stop) of a random orthonormal basis [into, into], float64, at the cost of these rows alone.

    A cosine transform (DCT-II) with rows and columns in random order and random signs of columns: subsampled
    randomised transforms stand in for uniformly random projections (Halko et al., arXiv 0909.4061, section 4.6).
    """
    frequency = torch.randperm(into, generator=random)[start:stop, None].double()
    place = torch.randperm(into, generator=random).double()
    signs = torch.randint(0, 2, (into,), generator=random).double() * 2 - 1
    rows = torch.cos(math.pi / into * (place + 0.5) * frequency) * math.sqrt(2 / into)
    return torch.where(frequency == 0, math.sqrt(1 / into), rows) * signs
