"""The stream of training batches of a rank.

    order       which sample when, as a function of (seed, epoch, head)         lte_scale.order
    reading     samples in that order, from shards read front to back           lte_scale.reading
    making      decode, augment, mix: a function of (seed, epoch, sample)       here, in worker processes
    iterate     count damage, hand over whole batches                           here, in the rank's process

The position of a stream is the number of batches consumed. Worker w of W makes batches start + w, start + w + W, ...,
and they are handed over in turn, so the batches depend neither on the number of workers nor on where a run resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from PIL.Image import Image

from lte_scale.archive import check_cache
from lte_scale.augment import ToBatch, erasing, mixup, preserved_randomness, seed_all, train_transform
from lte_scale.batches import Batch, Made
from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.damage import Damage, DamagedSample, DataError, Tally
from lte_scale.index import Shard, ShardIndex, open_index
from lte_scale.loader import in_workers
from lte_scale.reading import Sample, decode, head_batches

__all__ = ["Batch", "DataError", "Shard", "ShardIndex", "TrainStream", "open_index"]


class _Good(NamedTuple):
    """A sample that could be decoded, its image augmented."""

    image: Image
    label: int
    sample: Sample


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
        self.erase, self.mixup = erasing(augment), mixup(augment, num_classes)
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
        self.transform, self.to_batch = train_transform(augment, image_size, channels), ToBatch(augment, channels)
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

    def _make(self, start: int, worker: int, workers: int) -> Iterator[Made[Batch]]:
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

    def _batch(self, number: int, by_head: Sequence[Sequence[Sample]]) -> Made[Batch]:
        """Batch `number` of every head, decoded, augmented and mixed."""
        images, targets, labels = [], [], []
        damage: list[tuple[int, Damage]] = []
        whole = True
        for head, samples in zip(self.heads, by_head, strict=True):
            good = self._good_samples(samples, damage)
            if good is None:
                whole = False
                continue
            pixels, classes = self.to_batch([each.image for each in good]), torch.tensor([each.label for each in good])
            labels.append(classes)
            if self.erase:
                for image, each in zip(pixels, good, strict=True):
                    seed_all("erase", self.seed, each.sample.epoch, each.sample.id)
                    self.erase(image)
            if self.mixup:
                seed_all("mixup", self.seed, head, number, self.member)
                pixels, classes = self.mixup(pixels, classes)
            images.append(pixels)
            targets.append(classes)
        if not whole:
            return Made(None, tuple(damage))
        return Made(Batch(torch.cat(images), torch.cat(targets), torch.cat(labels), number + 1), tuple(damage))

    def _good_samples(self, samples: Sequence[Sample], damage: list[tuple[int, Damage]]) -> list[_Good] | None:
        """This member's slice of a head's batch, damaged ones replaced; None if the whole batch is damaged.

        The damage within the slice is added to `damage`. Decodes all, then augments all: of small images, going to
        and fro between the two costs a quarter more.
        """
        decoded: dict[int, tuple[Image, int] | Damage] = {}

        def at(place: int) -> tuple[Image, int] | Damage:
            if place not in decoded:
                try:
                    decoded[place] = decode(samples[place], self.channels, self.num_classes)
                except DamagedSample as error:
                    decoded[place] = error.damage
            return decoded[place]

        chosen = []
        for place in self.slice:
            found = at(place)
            if isinstance(found, Damage):
                damage.append((samples[place].epoch, found))
            cyclic = (other % len(samples) for other in range(place, place + len(samples)))
            replacement = next((other for other in cyclic if not isinstance(at(other), Damage)), None)
            if replacement is not None:
                chosen.append(replacement)
        made = {}
        for place in dict.fromkeys(chosen):
            image, label = cast("tuple[Image, int]", decoded[place])
            seed_all("augment", self.seed, samples[place].epoch, samples[place].id)
            made[place] = _Good(self.transform(image), label, samples[place])
        return [made[place] for place in chosen] or None
