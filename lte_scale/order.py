"""In which order a head sees the samples of an epoch: pure functions of (seed, epoch, head), no input or output.

    shards, permuted per (seed, epoch)   ->  one sequence of n samples
    cut into `heads` contiguous parts    ->  a head's part, read from its shards front to back
    shuffled within a buffer             ->  the order in which the head emits them

Each sample is in exactly one part, so all heads together emit each sample once per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SHARDS, _BUFFER = 1, 2


@dataclass(frozen=True, slots=True)
class Segment:
    """Samples `first` ... `first + count - 1` of shard number `shard`."""

    shard: int
    first: int
    count: int


def part(samples: int, number: int, parts: int) -> range:
    """The `number`-th of `parts` contiguous ranges that cover 0 ... samples - 1; their sizes differ by at most one."""
    return range(samples * number // parts, samples * (number + 1) // parts)


def segments(lengths: Sequence[int], shards: Sequence[int], positions: range) -> list[Segment]:
    """Which samples of which shards lie at `positions` of the sequence made by chaining `shards` in that order.

    Args:
        lengths: samples of every shard, by shard number.
        shards: shard numbers, in the order of the sequence.
    """
    found, start = [], 0
    for shard in shards:
        first = max(positions.start, start) - start
        last = min(positions.stop, start + lengths[shard]) - start
        if first < last:
            found.append(Segment(shard, first, last - first))
        start += lengths[shard]
    return found


def epoch_segments(lengths: Sequence[int], seed: int, epoch: int, head: int, heads: int) -> list[Segment]:
    """The part of `head` in the order in which it is read."""
    shards = _random(seed, epoch, _SHARDS).permutation(len(lengths)).tolist()
    return segments(lengths, shards, part(sum(lengths), head, heads))


def epoch_order(count: int, seed: int, epoch: int, head: int, buffer: int) -> NDArray[np.int64]:
    """Emission order [count] of samples that arrive as 0 ... count - 1: each time, one of the `buffer` at hand.

    The sample emitted as number i arrived before number i + buffer, so never more than `buffer` are held.
    """
    held = list(range(min(buffer, count)))
    order = []
    for arriving, pick in enumerate(_random(seed, epoch, _BUFFER, head).random_sample(count).tolist(), start=buffer):
        place = int(pick * len(held))
        order.append(held[place])
        if arriving < count:
            held[place] = arriving
        else:
            held[place] = held[-1]
            held.pop()
    return np.array(order, dtype=np.int64)


def epoch_plan(
    lengths: Sequence[int], seed: int, epoch: int, head: int, heads: int, buffer: int
) -> list[tuple[int, int]]:
    """What `head` emits in `epoch`: (shard number, sample number within it), in order of emission.

    Args:
        lengths: samples of every shard, by shard number.
        heads: heads in the whole run.
        buffer: samples in the shuffle buffer; 1 keeps the order of the shards.
    """
    parts = epoch_segments(lengths, seed, epoch, head, heads)
    arriving = [(s.shard, number) for s in parts for number in range(s.first, s.first + s.count)]
    return [arriving[position] for position in epoch_order(len(arriving), seed, epoch, head, buffer).tolist()]


def _random(*parts: int) -> np.random.RandomState:
    # The stream of RandomState is frozen (NEP 19): a resumed run keeps its order under another version of numpy.
    return np.random.RandomState(list(parts))
