"""Samples in a given order out of shards that are read front to back, with damage as data instead of exceptions."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lte_scale.archive import BACKOFF_SECONDS, IMAGE_EXTENSIONS, IMAGE_FORMATS, cached, is_remote, read_samples
from lte_scale.damage import Damage, DamagedSample
from lte_scale.index import Shard, ShardIndex
from lte_scale.order import Segment, epoch_order, epoch_segments, part


@dataclass(frozen=True, slots=True)
class Sample:
    """An undecoded sample. `id` is its number in the whole index, `epoch` the one it is read for."""

    id: int
    epoch: int
    name: str
    files: dict[str, bytes]
    damage: Damage | None = None


def decode(sample: Sample, channels: int, num_classes: int) -> tuple[Image.Image, int]:
    """The image, in mode L or RGB by `channels`, and the label.

    Args:
        num_classes: labels must be below it; 0 accepts any.

    Raises:
        DamagedSample: if there is no label or image, or it is unusable.
    """
    if sample.damage:
        raise DamagedSample(sample.damage.name, sample.damage)
    if "cls" not in sample.files:
        raise DamagedSample(f"{sample.name}: has no .cls")
    text = sample.files["cls"].decode("ascii", "replace").strip()
    if not text.isdecimal() or len(text) > 9 or (num_classes and int(text) >= num_classes):
        allowed = f"one of 0 ... {num_classes - 1}" if num_classes else "a class number"
        raise DamagedSample(f"{sample.name}.cls: label {text[:20]!r} is not {allowed}")
    extension = next((e for e in IMAGE_EXTENSIONS if e in sample.files), None)
    if extension is None:
        raise DamagedSample(f"{sample.name}: has no image")
    try:
        with Image.open(io.BytesIO(sample.files[extension]), formats=IMAGE_FORMATS) as image:
            return image.convert("L" if channels == 1 else "RGB"), int(text)
    except Exception as error:
        # Decoders raise anything on damaged bytes (OSError, SyntaxError, ValueError, struct.error, zlib.error, ...).
        raise DamagedSample(f"{sample.name}.{extension}: cannot be decoded ({_line(error)})") from error


def head_batches(
    index: ShardIndex,
    cache_dir: str,
    *,
    seed: int,
    head: int,
    heads: int,
    buffer: int,
    size: int,
    first: int,
    stride: int,
) -> Iterator[list[Sample]]:
    """Batches `first`, `first + stride`, ... of a head, `size` samples each, for ever.

    The head's stream is its part of epoch 0, of epoch 1, ...; batch k is samples k * size ... (k + 1) * size - 1 of it.
    Of the shards, only what these batches need is kept, and no more than `buffer` samples at a time.
    """
    batch: list[Sample] = []
    count = len(part(index.samples, head, heads))
    for epoch in itertools.count(first * size // count):
        numbers = (epoch * count + np.arange(count)) // size
        mine = (numbers >= first) & ((numbers - first) % stride == 0)
        order = epoch_order(count, seed, epoch, head, buffer)[mine]
        parts = epoch_segments(index.lengths, seed, epoch, head, heads)
        for sample in in_order(index, cache_dir, parts, order, epoch):
            batch.append(sample)
            if len(batch) == size:
                yield batch
                batch = []


def in_order(
    index: ShardIndex, cache_dir: str, parts: Sequence[Segment], order: NDArray[np.int64], epoch: int
) -> Iterator[Sample]:
    """The samples at the positions `order` of the chained `parts`, holding those that arrive before their turn."""
    held: dict[int, Sample] = {}
    arriving = _arriving(index, cache_dir, parts, np.sort(order), epoch)
    for position in order.tolist():
        while position not in held:
            arrived, sample = next(arriving)
            held[arrived] = sample
        yield held.pop(position)


def _arriving(
    index: ShardIndex, cache_dir: str, parts: Sequence[Segment], positions: NDArray[np.int64], epoch: int
) -> Iterator[tuple[int, Sample]]:
    """Every one of `positions` (ascending) with its sample, shard by shard; shards without any are not opened."""
    start = 0
    for segment in parts:
        low, high = np.searchsorted(positions, [start, start + segment.count])
        numbers = (positions[low:high] - start + segment.first).tolist()
        if numbers:
            shard, offset = index.shards[segment.shard], index.offsets[segment.shard]
            for number, name, files, damage in shard_samples(shard, numbers, cache_dir):
                yield start + number - segment.first, Sample(offset + number, epoch, name, files, damage)
        start += segment.count


def shard_samples(
    shard: Shard, numbers: Sequence[int], cache_dir: str
) -> Iterator[tuple[int, str, dict[str, bytes], Damage | None]]:
    """Every one of the samples `numbers` (ascending) of a shard; those that cannot be had come with the damage.

    What is remote is tried again after a pause; a local file does not mend itself.
    """
    remote, left, reason = is_remote(shard.url), list(numbers), ""
    for pause in (*BACKOFF_SECONDS, None) if remote else (None,):
        read = 0
        try:
            url = shard.url
            if remote and cache_dir:
                url = cached(url, cache_dir, size=shard.bytes, sha256=shard.sha256)
            for number, key, files in read_samples(url, left):
                read += 1
                yield number, f"{shard.url}/{_printable(key)}", files, None
            reason = "too few samples"
        except Exception as error:
            # tarfile and the transports raise anything on damaged bytes; a shard must never stop the run.
            reason = _line(error)
            if isinstance(error, FileNotFoundError | PermissionError):
                pause = None
        left = left[read:]
        if not left:
            return
        if pause is None:
            break
        time.sleep(pause)
    damage = Damage(f"{shard.url}: cannot be read from sample {left[0]} of {shard.samples} on ({reason})", shard.url)
    for number in left:
        yield number, f"{shard.url}/sample {number}", {}, damage


def _printable(key: str) -> str:
    """A name from an archive, as the log may show it: no line feed, nothing that a terminal would obey."""
    return key if key.isprintable() else ascii(key)[1:-1]


def _line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    # PIL names the buffer an image is decoded from.
    return _printable(re.sub(r" <_io\.BytesIO[^>]*>", "", text.splitlines()[0]))
