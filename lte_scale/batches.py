"""Batches as they leave the data pipeline, on their way from a worker process to the rank's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from lte_scale.damage import Damage


@dataclass(frozen=True)
class Batch:
    """One micro-step of a rank; H heads with b images each, head-major.

    images: [H * b, C, S, S] float32, normalised. labels: [H * b] int64.
    targets: [H * b, classes] float32 with mixup or CutMix (label smoothing included), otherwise the labels, and
        smoothing them is the loss's task.
    position: from where a later run continues after this batch.
    bad: names of damaged samples and shards met since the batch before. damaged: how many samples that cost; shards:
        how many shards are damaged as a whole.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    position: int
    bad: tuple[str, ...] = ()
    damaged: int = 0
    shards: int = 0

    def pin_memory(self) -> Batch:
        images, targets, labels = (t.pin_memory() for t in (self.images, self.targets, self.labels))
        return replace(self, images=images, targets=targets, labels=labels)


@dataclass(frozen=True)
class EvalBatch:
    """images [B, C, S, S] float32, labels [B] int64, valid [B]: False for padding and damaged samples."""

    images: Tensor
    labels: Tensor
    valid: Tensor
    bad: tuple[str, ...] = ()

    def pin_memory(self) -> EvalBatch:
        images, labels, valid = (t.pin_memory() for t in (self.images, self.labels, self.valid))
        return replace(self, images=images, labels=labels, valid=valid)


B = TypeVar("B", "Batch", "EvalBatch")


@dataclass(frozen=True)
class Made(Generic[B]):
    """A batch as it leaves a worker; None in place of a training batch in which a head has no good sample."""

    batch: B | None
    damage: tuple[tuple[int, Damage], ...]

    def pin_memory(self) -> Made[B]:
        return replace(self, batch=self.batch and self.batch.pin_memory())
