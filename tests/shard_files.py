"""Small shards whose pixels say which sample they are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lte_scale.config.schema import AugmentConfig
from lte_scale.index import ShardIndex, open_index

CLASSES = 5
SIZE = 4
# Pixel values come out as they went in, divided by 255.
PLAIN = AugmentConfig(mean=[0.0], std=[1.0])


def png(identity: int) -> bytes:
    """A grey image that holds `identity` in its first two pixels and noise made from it in the others."""
    pixels = np.random.RandomState(identity).randint(0, 256, (SIZE, SIZE)).astype(np.uint8)
    pixels[0, 0], pixels[0, 1] = identity % 256, identity // 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def sample_files(identity: int) -> dict[str, bytes]:
    return {f"{identity:06d}.png": png(identity), f"{identity:06d}.cls": str(identity % CLASSES).encode()}


def write_lengths(folder: Path, lengths: Sequence[int]) -> ShardIndex:
    """Shards of so many samples, whose identities count through; opened."""
    first = 0
    for number, length in enumerate(lengths):
        files: dict[str, bytes] = {}
        for identity in range(first, first + length):
            files |= sample_files(identity)
        write_tar(folder / f"{number:05d}.tar", files)
        first += length
    return open_index(str(folder))
