"""The batches of an evaluation: a rank's part of all samples, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lte_scale.archive import check_cache
from lte_scale.augment import ToBatch, Transform, eval_transform
from lte_scale.batches import EvalBatch, Made
from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.damage import DamagedSample, Tally
from lte_scale.index import ShardIndex
from lte_scale.loader import in_workers
from lte_scale.order import part, segments
from lte_scale.reading import decode, in_order


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
        eval_transform(image_size),
        ToBatch(augment, channels),
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
    to_batch: ToBatch,
    worker: int,
    workers: int,
) -> Iterator[Made[EvalBatch]]:
    """Batches worker, worker + workers, ... of `batches`, each of `shape`."""
    size, channels = shape[:2]
    numbers = np.arange(len(positions)) // size
    parts = segments(index.lengths, range(len(index.shards)), positions)
    samples = in_order(index, cache_dir, parts, np.flatnonzero(numbers % workers == worker), epoch=0)
    for number in range(worker, batches, workers):
        pixels, labels = torch.zeros(shape), torch.zeros(size, dtype=torch.int64)
        valid, damage, images = torch.zeros(size, dtype=torch.bool), [], []
        for place, sample in enumerate(itertools.islice(samples, int(np.count_nonzero(numbers == number)))):
            try:
                image, label = decode(sample, channels, num_classes)
            except DamagedSample as error:
                damage.append((0, error.damage))
            else:
                images.append(transform(image))
                labels[place], valid[place] = label, True
        if images:
            pixels[valid] = to_batch(images)
        yield Made(EvalBatch(pixels, labels, valid), tuple(damage))
