"""The stream of training batches of a rank, and evaluation's.

    order       which sample when, as a function of (seed, epoch, head)         lte_scale.order
    reading     samples in that order, from shards read front to back           lte_scale.reading
    making      decode, augment, mix: a function of (seed, epoch, sample)       here, in worker processes
    iterate     count damage, hand over whole batches                           here, in the rank's process

The position of a stream is the number of batches consumed. Worker w of W makes batches start + w, start + w + W, ...,
and they are handed over in turn, so the batches depend neither on the number of workers nor on where a run resumed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lte_scale.archive import check_cache
from lte_scale.augment import Transform, eval_transform, mixup, preserved_randomness, seed_all, train_transform
from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.damage import Damage, DamagedSample, DataError, Tally
from lte_scale.index import Shard, ShardIndex, open_index
from lte_scale.loader import in_workers
from lte_scale.order import part, segments
from lte_scale.reading import Sample, decode, head_batches, in_order

__all__ = ["Batch", "DataError", "EvalBatch", "Shard", "ShardIndex", "TrainStream", "evaluation_batches", "open_index"]


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
class _Made(Generic[B]):
    """A batch as it leaves a worker; None in place of a training batch in which a head has no good sample."""

    batch: B | None
    damage: tuple[tuple[int, Damage], ...]

    def pin_memory(self) -> _Made[B]:
        return replace(self, batch=self.batch and self.batch.pin_memory())


class TrainStream:
    """The endless training batches of a rank.

    Args:
        index: the training shards.
        heads: global ids of the heads of this rank; their batches are chained in one.
        total_heads: heads in the run, among which an epoch is divided.
        member, members: this rank's place among the ranks that share its head. Member m takes the m-th slice of every
            batch of the head.
        batch_size: images per head and batch, over all its members.
        num_classes: labels must be below it.

    Raises:
        ValueError: if the data cannot be divided so, or the augmentation makes no sense.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        heads: range,
        total_heads: int,
        member: int,
        members: int,
        batch_size: int,
        seed: int,
        image_size: int,
        channels: int,
        num_classes: int,
        augment: AugmentConfig,
        data: DataConfig,
    ) -> None:
        self.index, self.heads, self.total_heads, self.batch_size = index, heads, total_heads, batch_size
        self.member, self.seed, self.channels, self.num_classes, self.data = member, seed, channels, num_classes, data
        if total_heads > index.samples:
            raise ValueError(
                f"{index.location}: {index.samples} samples cannot be divided among {total_heads} heads; "
                "use fewer heads or more data"
            )
        if batch_size % members:
            raise ValueError(
                f"train.batch_size: {batch_size} images cannot be divided among the {members} ranks of a head; "
                f"use a multiple of {members}"
            )
        self.slice = range(batch_size // members * member, batch_size // members * (member + 1))
        self.mixup = mixup(augment, num_classes)
        if self.mixup and len(self.slice) % 2:
            raise ValueError(
                f"train.batch_size: mixup and cutmix need an even number of images per head and rank, not "
                f"{len(self.slice)}; use a multiple of {2 * members}"
            )
        if not num_classes:
            raise ValueError(f"model.num_classes: the shards of {index.location} do not name their classes; set it")
        if index.num_classes > num_classes:
            raise ValueError(
                f"model.num_classes: {num_classes} is fewer than the {index.num_classes} classes of {index.location}; "
                "set it to 0 to take their number"
            )
        self.transform = train_transform(augment, image_size, channels)
        check_cache(data.cache_dir)

    @property
    def batches_per_epoch(self) -> float:
        """Batches in which all heads together see as many samples as an epoch has."""
        return self.index.samples / (self.total_heads * self.batch_size)

    def epoch_of(self, position: int) -> float:
        """Epochs seen after `position` batches."""
        return position / self.batches_per_epoch

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ..., for ever. Close the iterator to end its workers at once.

        A damaged sample's place is taken by a copy of the next good sample of its head's batch; a batch in which a head
        has none is left out.

        Raises:
            DataError: once the damaged samples this rank has met are more than `data.max_bad_ratio` of those it has
                read, or of an epoch's where that is more: one bad shard read early on is no reason to stop.
        """
        tally = Tally(self.index, self.data.max_bad_ratio)
        names: list[str] = []
        damaged, shards, without = 0, 0, 0
        for made in in_workers(partial(self._make, start), self.data.workers, self.data.prefetch):
            names += tally.add(len(self.heads) * len(self.slice), made.damage)
            damaged += len(made.damage)
            if made.batch is not None:
                yield replace(made.batch, bad=tuple(names), damaged=damaged, shards=len(tally.shards) - shards)
                names, damaged, shards, without = [], 0, len(tally.shards), 0
                continue
            without += 1
            if without > self.batches_per_epoch + 1:
                raise tally.error(f"no whole batch in {without} batches")

    def _make(self, start: int, worker: int, workers: int) -> Iterator[_Made[Batch]]:
        first = start + worker
        streams = [
            head_batches(
                self.index,
                self.data.cache_dir,
                seed=self.seed,
                head=head,
                heads=self.total_heads,
                buffer=self.data.shuffle_buffer,
                size=self.batch_size,
                first=first,
                stride=workers,
            )
            for head in self.heads
        ]
        for number in itertools.count(first, workers):
            by_head = [next(stream) for stream in streams]
            with preserved_randomness():
                made = self._batch(number, by_head)
            yield made

    def _batch(self, number: int, by_head: Sequence[Sequence[Sample]]) -> _Made[Batch]:
        """Batch `number` of every head, decoded, augmented and mixed."""
        images, targets, labels = [], [], []
        damage: list[tuple[int, Damage]] = []
        whole = True
        for head, samples in zip(self.heads, by_head, strict=True):
            good = self._good_samples(samples, damage)
            if good is None:
                whole = False
                continue
            pixels, classes = torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good])
            labels.append(classes)
            if self.mixup:
                seed_all("mixup", self.seed, head, number, self.member)
                pixels, classes = self.mixup(pixels, classes)
            images.append(pixels)
            targets.append(classes)
        if not whole:
            return _Made(None, tuple(damage))
        return _Made(Batch(torch.cat(images), torch.cat(targets), torch.cat(labels), number + 1), tuple(damage))

    def _good_samples(
        self, samples: Sequence[Sample], damage: list[tuple[int, Damage]]
    ) -> list[tuple[Tensor, int]] | None:
        """This member's slice of a head's batch, damaged ones replaced; None if the whole batch is damaged.

        The damage within the slice is added to `damage`.
        """
        made: dict[int, tuple[Tensor, int] | Damage] = {}

        def at(place: int) -> tuple[Tensor, int] | Damage:
            if place not in made:
                sample = samples[place]
                try:
                    image, label = decode(sample, self.channels, self.num_classes)
                except DamagedSample as error:
                    made[place] = error.damage
                else:
                    seed_all("augment", self.seed, sample.epoch, sample.id)
                    made[place] = self.transform(image), label
            return made[place]

        good = []
        for place in self.slice:
            found = at(place)
            if isinstance(found, Damage):
                damage.append((samples[place].epoch, found))
            cyclic = (at(other % len(samples)) for other in range(place, place + len(samples)))
            replacement = next((result for result in cyclic if not isinstance(result, Damage)), None)
            if replacement is not None:
                good.append(replacement)
        return good or None


def evaluation_batches(
    index: ShardIndex,
    *,
    rank: int,
    world: int,
    batch_size: int,
    image_size: int,
    channels: int,
    augment: AugmentConfig,
    data: DataConfig,
    num_classes: int = 0,
) -> Iterator[EvalBatch]:
    """This rank's contiguous part of all samples, once, in as many batches as every other rank yields.

    Every batch has `batch_size` places; padding and damaged samples are not valid.

    Args:
        num_classes: labels must be below it; 0 takes it from the index, where known.
    """
    check_cache(data.cache_dir)
    batches = math.ceil(math.ceil(index.samples / world) / batch_size)
    make = partial(
        _make_evaluation,
        index,
        data.cache_dir,
        part(index.samples, rank, world),
        batches,
        (batch_size, channels, image_size, image_size),
        num_classes or index.num_classes,
        eval_transform(augment, image_size, channels),
    )
    tally = Tally(index, max_bad_ratio=1.0)
    for made in in_workers(make, min(data.workers, batches), data.prefetch):
        assert made.batch is not None
        yield replace(made.batch, bad=tuple(tally.add(batch_size, made.damage)))


def _make_evaluation(
    index: ShardIndex,
    cache_dir: str,
    positions: range,
    batches: int,
    shape: tuple[int, int, int, int],
    num_classes: int,
    transform: Transform,
    worker: int,
    workers: int,
) -> Iterator[_Made[EvalBatch]]:
    """Batches worker, worker + workers, ... of `batches`, each of `shape`."""
    size, channels = shape[:2]
    numbers = np.arange(len(positions)) // size
    parts = segments(index.lengths, range(len(index.shards)), positions)
    samples = in_order(index, cache_dir, parts, np.flatnonzero(numbers % workers == worker), epoch=0)
    for number in range(worker, batches, workers):
        images, labels = torch.zeros(shape), torch.zeros(size, dtype=torch.int64)
        valid, damage = torch.zeros(size, dtype=torch.bool), []
        for place, sample in enumerate(itertools.islice(samples, int(np.count_nonzero(numbers == number)))):
            try:
                image, label = decode(sample, channels, num_classes)
            except DamagedSample as error:
                damage.append((0, error.damage))
            else:
                images[place], labels[place], valid[place] = transform(image), label, True
        yield _Made(EvalBatch(images, labels, valid), tuple(damage))
