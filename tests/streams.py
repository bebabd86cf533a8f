"""What the tests of the data stream share: a stream over an index, its batches, and which samples they hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from lte_scale.config.schema import AugmentConfig, DataConfig
from lte_scale.data import Batch, ShardIndex, TrainStream, open_index
from tests.shard_files import CLASSES, PLAIN, SIZE, sample_files, write_tar

UNEVEN = (3, 11, 0, 1, 6, 2)
HEAVY = AugmentConfig(
    crop_scale=0.5, pad_crop=1, hflip=0.5, rand_augment="rand-m9-mstd0.5", random_erasing=0.5, mean=[0.0], std=[1.0]
)
HERE = DataConfig(workers=0, shuffle_buffer=4, max_bad_ratio=1.0)


def stream(index: ShardIndex, **changes: Any) -> TrainStream:
    options: dict[str, Any] = {
        "heads": range(1), "total_heads": 1, "member": 0, "members": 1, "batch_size": 4, "seed": 7,
        "image_size": SIZE, "channels": 1, "num_classes": CLASSES, "augment": PLAIN, "data": HERE,
    }  # fmt: skip
    return TrainStream(index, **(options | changes))


def take(source: TrainStream, count: int, start: int = 0) -> list[Batch]:
    batches = source.iterate(start)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def identities(images: Tensor) -> list[int]:
    """Which samples unaugmented images are."""
    pixels = (images[:, 0, 0, :2] * 255).round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.images.equal(other.images)
        assert one.targets.equal(other.targets)
        assert one.labels.equal(other.labels)
        assert one.position == other.position


def damaged_index(tmp_path: Path) -> ShardIndex:
    """Twelve samples (0 ... 11) of which 1 has no label, 3 a damaged image, 5 no image, 6 a label out of range."""
    files: dict[str, bytes] = {}
    for identity in range(12):
        files |= sample_files(identity)
    del files["000001.cls"]
    files["000003.png"] = files["000003.png"][:40]
    del files["000005.png"]
    files["000006.cls"] = b"99"
    write_tar(tmp_path / "0.tar", files)
    return open_index(str(tmp_path))
