"""What shards are written from: image folders, IDX files, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# As they are in an image folder, and as they are in a shard.
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")
CONVERTED_SUFFIXES = (".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SUFFIXES = KEPT_SUFFIXES + CONVERTED_SUFFIXES
GREY_MODES = ("1", "L", "LA", "I", "I;16")
# The t10k set is the validation split, as everywhere in the literature.
IDX_NAMES = {"train": "train", "val": "t10k"}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FOLDER_VAL_RATIO, DIGITS_VAL_RATIO = 0.1, 0.2


@dataclass(frozen=True)
class Item:
    """An image, as a file or as pixels ([H, W] grey or [H, W, 3], uint8), and its label."""

    image: Path | NDArray[np.uint8]
    label: int


@dataclass(frozen=True)
class Source:
    """The splits of a data set. `channels` is that of the images: 1 or 3."""

    splits: dict[str, list[Item]]
    classes: tuple[str, ...]
    channels: int


def open_source(source: str, *, val_ratio: float | None, seed: int) -> Source | None:
    """What `lte-scale shards` is asked to write; None for a folder that holds shards already.

    Args:
        source: a folder, or `digits`.
        val_ratio: part of every class that becomes the validation split where the source has none; None takes 0.1
            for image folders and 0.2 for the digits.

    Raises:
        ValueError: if `source` is none of these.
    """
    if val_ratio is not None and not 0 < val_ratio < 1:
        raise ValueError(f"--val-ratio: {val_ratio} is not between 0 and 1")
    folder = Path(source)
    if source == "digits" and not folder.is_dir():
        return _digits(val_ratio or DIGITS_VAL_RATIO, seed)
    if not folder.is_dir():
        raise ValueError(f"{source}: no such folder; name an image folder, a folder of IDX files, or the word digits")
    if _idx_file(folder, "train", "images"):
        return _idx(folder)
    if any(folder.glob("*.tar")) or any(folder.glob("*/*.tar")):
        return None
    return _image_folder(folder, val_ratio or FOLDER_VAL_RATIO, seed)


def _digits(val_ratio: float, seed: int) -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    items = [Item(image, int(label)) for image, label in zip(pixels, data.target, strict=True)]
    return Source(_split(items, val_ratio, seed), tuple(map(str, range(10))), channels=1)


def _split(items: Sequence[Item], val_ratio: float, seed: int) -> dict[str, list[Item]]:
    """Stratified: of every class, `val_ratio` of its images, rounded, but at least one unless it has no other."""
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for label in sorted({item.label for item in items}):
        members = [item for item in items if item.label == label]
        order = np.random.RandomState([seed, label]).permutation(len(members)).tolist()
        held_out = min(max(1, round(len(members) * val_ratio)), len(members) - 1)
        splits["val"] += [members[i] for i in order[:held_out]]
        splits["train"] += [members[i] for i in order[held_out:]]
    return splits


def _image_folder(folder: Path, val_ratio: float, seed: int) -> Source:
    """Class per directory, below train/ and val/ where these exist."""
    train, val = folder / "train", folder / "val"
    root = train if train.is_dir() else folder
    classes = _subfolders(root)
    if not classes:
        raise ValueError(
            f"{root}: has no class directories with images, no IDX files (train-images-idx3-ubyte) and no .tar shards"
        )
    items = _class_items(root, classes, classes)
    if root == train and val.is_dir():
        unknown = sorted(set(_subfolders(val)) - set(classes))
        if unknown:
            raise ValueError(f"{val / unknown[0]}: train has no class {unknown[0]}; both splits need the same classes")
        present = [name for name in classes if (val / name).is_dir()]
        splits = {"train": items, "val": _class_items(val, present, classes)}
    else:
        splits = _split(items, val_ratio, seed)
    first = items[0].image
    assert isinstance(first, Path)
    return Source(splits, tuple(classes), _channels(first))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_items(root: Path, present: Sequence[str], classes: Sequence[str]) -> list[Item]:
    items = []
    for name in present:
        label = classes.index(name)
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files = [path for path in files if not path.name.startswith(".")]
        if not files:
            raise ValueError(f"{root / name}: a class directory without images ({', '.join(SUFFIXES)})")
        items += [Item(path, label) for path in files]
    return items


def _channels(path: Path) -> int:
    """1 for grey images, 3 for all others."""
    try:
        with Image.open(path) as image:
            return 1 if image.mode in GREY_MODES else 3
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); mend or remove it") from error


def _idx(folder: Path) -> Source:
    splits = {}
    for split, name in IDX_NAMES.items():
        images, labels = (_read_idx(_must(folder, name, kind)) for kind in ("images", "labels"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(f"{folder}: the {name} files hold {len(images)} images and {len(labels)} labels")
        splits[split] = [Item(image, int(label)) for image, label in zip(images, labels, strict=True)]
    # The two data sets share file names and shapes; only the folder tells them apart.
    count = 1 + max(item.label for items in splits.values() for item in items)
    fashion = count == 10 and "fashion" in str(folder.resolve()).lower()
    return Source(splits, FASHION_CLASSES if fashion else tuple(map(str, range(count))), channels=1)


def _must(folder: Path, split: str, kind: str) -> Path:
    path = _idx_file(folder, split, kind)
    if path is None:
        raise ValueError(f"{folder}: has no {_idx_name(split, kind)} (raw or .gz)")
    return path


def _idx_file(folder: Path, split: str, kind: str) -> Path | None:
    name = _idx_name(split, kind)
    return next((folder / n for n in (f"{name}.gz", name) if (folder / n).is_file()), None)


def _idx_name(split: str, kind: str) -> str:
    return f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format: 0, 0, type 8, number of dimensions, sizes, big-endian; values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: is no IDX file of unsigned bytes")
    header = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4))
    if len(data) != header + math.prod(shape):
        raise ValueError(f"{path}: holds {len(data) - header} values, its header announces {math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
