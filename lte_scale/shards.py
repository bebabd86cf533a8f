"""Writing WebDataset shards with their index: `lte-scale shards SOURCE OUT`.

    OUT/train/00000.tar ...     <key>.png (or the original jpg, jpeg, png) and <key>.cls (the label as text)
    OUT/train/index.json        counts, classes, checksums: see lte_scale.index
    OUT/val/...                 the same

The bytes are a function of the source and the arguments alone. OUT appears when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from lte_scale.archive import IMAGE_EXTENSIONS, read_samples
from lte_scale.index import FORMAT, count_samples
from lte_scale.sources import GREY_MODES, KEPT_SUFFIXES, Item, Source, open_source

SAMPLES_PER_SHARD = 1000

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `lte-scale shards`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="image folder (class per directory, with train/ and val/ or without), folder of IDX files "
        "(MNIST, Fashion-MNIST), `digits`, or a folder of .tar shards that lack an index",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--val-ratio",
        type=float,
        metavar="R",
        help="part of every class held out for validation where SOURCE has no val split (0.1; digits 0.2)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and the split (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (0: one per core)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Write what the command line asks for. Returns the exit code.

    Raises:
        ValueError: as `write_shards`.
    """
    try:
        write_shards(
            args.source,
            args.out,
            samples_per_shard=args.samples_per_shard,
            val_ratio=args.val_ratio,
            seed=args.seed,
            workers=args.workers,
            progress=not args.quiet and sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    for path in sorted(Path(args.out).glob("**/index.json")):
        index = json.loads(path.read_text())
        samples = sum(shard["samples"] for shard in index["shards"])
        print(f"{path.parent}: {samples:,} samples, {len(index['classes'])} classes, {len(index['shards'])} shards")
    return 0


def write_shards(
    source: str,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    val_ratio: float | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool = False,
) -> None:
    """Write train and val shards of `source` into the new directory `out`; of existing shards, their index alone.

    Existing shards may be indexed in place, with `out` the directory they are in.

    Args:
        source, val_ratio: as `lte_scale.sources.open_source`.
        seed: of the order of the samples, by which every shard has a mix of classes, and of the split.
        workers: processes; 0 takes one per core.

    Raises:
        ValueError: if the source is unusable, `out` is not empty, or writing fails.
    """
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard: {samples_per_shard} is not at least 1")
    opened = open_source(source, val_ratio=val_ratio, seed=seed)
    workers = workers or os.cpu_count() or 1
    try:
        if opened is not None:
            with _published(out) as directory:
                _write_splits(opened, directory, samples_per_shard, seed, workers, progress)
        elif out.is_dir() and out.samefile(source):
            _index_existing(Path(source), out, out, workers, progress)
        else:
            with _published(out) as directory:
                _index_existing(Path(source), directory, out, workers, progress)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{out}: cannot be written ({place}{error.strerror or error})") from error


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when all went well and vanishes otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new directory, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield directory
        umask = os.umask(0)
        os.umask(umask)
        directory.chmod(0o777 & ~umask)
        os.replace(directory, out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_splits(
    source: Source, directory: Path, samples_per_shard: int, seed: int, workers: int, progress: bool
) -> None:
    tasks: list[tuple[Path, int, list[Item]]] = []
    for number, (split, items) in enumerate(source.splits.items()):
        (directory / split).mkdir()
        order = np.random.RandomState([seed, number]).permutation(len(items)).tolist()
        for shard in range(math.ceil(len(items) / samples_per_shard)):
            first = shard * samples_per_shard
            chosen = [items[i] for i in order[first : first + samples_per_shard]]
            tasks.append((directory / split / f"{shard:05d}.tar", first, chosen))
    written = _parallel(_write_shard, tasks, workers, progress)
    for split in source.splits:
        shards = [entry for task, entry in zip(tasks, written, strict=True) if task[0].parent.name == split]
        _write_index(directory / split, shards, source.classes, source.channels)


def _write_shard(task: tuple[Path, int, list[Item]]) -> dict[str, Any]:
    """Write one tar; its entry of the index. Keys number the samples of the split."""
    path, first, items = task
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, item in enumerate(items, start=first):
            suffix, content = _encoded(item.image)
            _add(tar, f"{number:08d}{suffix}", content)
            _add(tar, f"{number:08d}.cls", str(item.label).encode())
    return _entry(path, path.name, len(items))


def _encoded(image: Any) -> tuple[str, bytes]:
    """Suffix and bytes of an image in a shard."""
    if isinstance(image, Path) and image.suffix.lower() in KEPT_SUFFIXES:
        return image.suffix.lower(), image.read_bytes()
    buffer = io.BytesIO()
    try:
        with Image.open(image) if isinstance(image, Path) else Image.fromarray(image) as opened:
            grey = opened.mode in GREY_MODES
            opened.convert("L" if grey else "RGB").save(buffer, "png")
    except Exception as error:
        raise ValueError(f"{image}: cannot be read as an image ({error}); mend or remove it") from error
    return ".png", buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def _entry(path: Path, name: str, samples: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_index(directory: Path, shards: Sequence[dict[str, Any]], classes: Sequence[str], channels: int) -> None:
    index = {"format": FORMAT, "classes": list(classes), "channels": channels, "shards": list(shards)}
    partial = directory / ".index.json.part"
    partial.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, directory / "index.json")


def _index_existing(source: Path, directory: Path, out: Path, workers: int, progress: bool) -> None:
    """Indexes of the shards in `source`, or of those in its subdirectories, written into `directory`.

    Names are relative where the index ends up (`out`) beside its shards, and absolute elsewhere.
    """
    folders = [source] if any(source.glob("*.tar")) else sorted({tar.parent for tar in source.glob("*/*.tar")})
    for folder in folders:
        if (folder / "index.json").exists():
            raise ValueError(f"{folder}: its shards have an index.json already; they can be used as they are")
    for folder in folders:
        place = folder.relative_to(source)
        tars = sorted(folder.glob("*.tar"))
        described = _parallel(_describe_shard, tars, workers, progress)
        beside = (out / place).resolve() == folder.resolve()
        for path, (entry, _, _) in zip(tars, described, strict=True):
            entry["name"] = path.name if beside else str(path.resolve())
        classes = tuple(map(str, range(1 + max((label for _, label, _ in described), default=-1))))
        (directory / place).mkdir(exist_ok=True)
        channels = max(channels for _, _, channels in described) or 3
        _write_index(directory / place, [entry for entry, _, _ in described], classes, channels)


def _describe_shard(path: Path) -> tuple[dict[str, Any], int, int]:
    """Index entry, largest label (-1: none) and channels of an existing shard, as far as it is undamaged."""
    samples, largest, channels = count_samples(str(path)), -1, 0
    with suppress(OSError, tarfile.TarError):
        for _, _, files in read_samples(str(path), range(samples)) if samples else ():
            label = files.get("cls", b"").strip()
            largest = max(largest, int(label) if label.isdigit() else -1)
            channels = channels or _channels(files)
    return _entry(path, path.name, samples), largest, channels


def _channels(files: dict[str, bytes]) -> int:
    """Of the image of a sample; 0 if there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in files:
            with suppress(Exception), Image.open(io.BytesIO(files[extension])) as image:
                return 1 if image.mode in GREY_MODES else 3
    return 0


def _parallel(function: Callable[[Any], T], tasks: Sequence[Any], workers: int, progress: bool) -> list[T]:
    """`function` of every task, in their order, with a progress bar over shards."""
    with tqdm(total=len(tasks), unit="shard", disable=not progress) as bar:
        if workers == 1 or len(tasks) == 1:
            results = []
            for task in tasks:
                results.append(function(task))
                bar.update()
            return results
        with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_ignore_interrupts) as pool:
            futures = [pool.submit(function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise ValueError("a writing process was killed (out of memory?); try --workers 1") from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _ignore_interrupts() -> None:
    """Ctrl-C is for the parent, which then removes what is half written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
