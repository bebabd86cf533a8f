"""Damage in the data: what it is called, how much of it there is, when it is too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lte_scale.index import ShardIndex


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a sample; `shard` is the URL of the shard where the fault is the whole shard's."""

    name: str
    shard: str = ""


class DamagedSample(Exception):
    """A sample that cannot be used; the message names it, `damage` says it as data."""

    def __init__(self, message: str, damage: Damage | None = None) -> None:
        super().__init__(message)
        self.damage = damage or Damage(message)


class DataError(ValueError):
    """Too much of the data is damaged to go on."""


class Tally:
    """Damage met so far in this process: each sample is named, and each shard once per epoch."""

    def __init__(self, index: ShardIndex, max_bad_ratio: float) -> None:
        self.index, self.max_bad_ratio = index, max_bad_ratio
        self.read, self.damaged = 0, 0
        self.first_names: list[str] = []
        self.shards: set[tuple[int, str]] = set()

    def add(self, read: int, damage: Sequence[tuple[int, Damage]]) -> list[str]:
        """Count the samples of a batch; the names that are new.

        Raises:
            DataError: if it has become too much.
        """
        self.read, self.damaged = self.read + read, self.damaged + len(damage)
        names = []
        for epoch, fault in damage:
            if (epoch, fault.shard) not in self.shards:
                names.append(fault.name)
            if fault.shard:
                self.shards.add((epoch, fault.shard))
        self.first_names = list(dict.fromkeys(self.first_names + names))[:3]
        if self.damaged > self.max_bad_ratio * max(self.read, self.index.samples):
            raise self.error(f"more than data.max_bad_ratio={self.max_bad_ratio} allows")
        return names

    def error(self, reason: str) -> DataError:
        return DataError(
            f"{self.index.location}: {self.damaged} of {self.read} samples read are damaged, {reason}; "
            f"mend or leave out the shards, or raise data.max_bad_ratio; the first: {'; '.join(self.first_names)}"
        )
