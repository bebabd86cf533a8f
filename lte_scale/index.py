"""Which shards there are and how many samples each holds: known before the first one is read.

    train/00000.tar ... 00059.tar
    train/index.json    {"format": 1, "classes": [...], "channels": 1,
                         "shards": [{"name", "samples", "bytes", "sha256"}, ...]}

Exact epochs, equal step counts and resuming all rest on these counts.
"""

from __future__ import annotations

import difflib
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from lte_scale.archive import beside, fetch, is_remote, members, open_tar, shard_name

log = logging.getLogger("lte_scale")

FORMAT = 1
INDEX_NAMES = ("index.json", "_info.json")


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file; `bytes` and `sha256` are zero and empty where no index names them."""

    url: str
    samples: int
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one split. `classes` is empty where no index names them."""

    location: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Zero where unknown."""
        return len(self.classes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Samples of every shard."""
        return tuple(shard.samples for shard in self.shards)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Samples in the shards before each shard: offset + number within the shard identifies a sample."""
        return (0, *accumulate(self.lengths))[:-1]

    @cached_property
    def samples(self) -> int:
        return sum(self.lengths)


@dataclass
class _Listing:
    """What is known of the shards of one directory, by name."""

    shards: dict[str, Shard] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def open_index(location: str, *, allow_pipe: bool = False) -> ShardIndex:
    """The shards at `location`: a directory, `dir/{000..099}.tar`, or such a URL (http, https, s3, ..., pipe).

    Counts come from the `index.json` beside the shards (or timm's `_info.json`); local shards without one are counted.

    Raises:
        ValueError: if there is nothing there, a local shard is missing, or remote shards have no index.
    """
    if not location:
        raise ValueError("no shards are named: set data.train to a directory, a pattern or a URL of shards")
    try:
        urls = list(braceexpand(location))
    except ValueError as error:
        raise ValueError(f"{location}: unbalanced braces; write a range as {{00000..00009}}.tar") from error
    if not allow_pipe and (pipe := next((url for url in urls if url.startswith("pipe:")), None)):
        raise ValueError(f"{pipe}: a pipe runs a shell command; set data.allow_pipe=true to accept it")
    listings: dict[str, _Listing] = {}
    shards: list[Shard] = []
    for url in urls:
        if shard_name(url):
            where = beside(url, "index.json")
            if where not in listings:
                listings[where] = _listing(beside(url, ""), where)
            shards.append(_shard(url, listings[where]))
        else:
            listings[url] = _directory(url)
            shards.extend(listings[url].shards.values())
    classes = {listing.classes for listing in listings.values() if listing.classes}
    if len(classes) > 1:
        raise ValueError(f"{location}: its directories do not have the same classes; name one data set")
    index = ShardIndex(location, tuple(shards), next(iter(classes), ()))
    if not index.samples:
        raise ValueError(f"{location}: holds no samples; write shards with `lte-scale shards SOURCE OUT`")
    return index


def count_samples(path: str) -> int:
    """Samples in a local shard, from its headers; of a damaged one, those before the damage, with a warning."""
    count = 0
    try:
        with open_tar(path) as tar:
            for number, *_ in members(tar):
                count = number + 1
    except (OSError, tarfile.TarError) as error:
        log.warning("%s is damaged after %d samples: %s", path, count, error)
    return count


def nearest(path: Path) -> str:
    """A hint at the existing name most like that of the missing `path`, to end a message with."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; the nearest that exists is {parent / close[0]}" if close else f"; {parent} has nothing of a like name"


def _directory(url: str) -> _Listing:
    """All shards of a directory."""
    directory = url.rstrip("/") or "/"
    if is_remote(url):
        return _listing(f"{directory}/", f"{directory}/index.json")
    path = Path(url)
    if not path.is_dir():
        raise ValueError(f"{url}: no such directory or shard{nearest(path)}")
    listing = _listing(f"{directory}/", f"{directory}/index.json")
    if not listing.shards:
        listing.shards = {tar.name: Shard(str(tar), count_samples(str(tar))) for tar in sorted(path.glob("*.tar"))}
        if not listing.shards:
            splits = [str(child) for child in sorted(path.iterdir()) if any(child.glob("*.tar"))]
            hint = f"did you mean {splits[0]}" if splits else "write some with `lte-scale shards SOURCE OUT`"
            raise ValueError(f"{url}: has neither index.json nor .tar files; {hint}")
    for shard in listing.shards.values():
        _must_exist(shard)
    return listing


def _shard(url: str, listing: _Listing) -> Shard:
    """The shard `url`, with what the listing of its directory says of it."""
    known = listing.shards.get(shard_name(url))
    if known is None and is_remote(url):
        raise ValueError(f"{url}: the index beside it does not name this shard; rewrite it with `lte-scale shards`")
    shard = Shard(url, known.samples, known.bytes, known.sha256) if known else Shard(url, -1)
    _must_exist(shard)
    return shard if known else Shard(url, count_samples(url))


def _must_exist(shard: Shard) -> None:
    if not is_remote(shard.url) and not Path(shard.url).is_file():
        raise ValueError(f"{shard.url}: no such shard{nearest(Path(shard.url))}")


def _listing(prefix: str, where: str) -> _Listing:
    """What `index.json` at `where`, or `_info.json` in its place, says; empty for a local directory without them."""
    reason = ""
    for name in INDEX_NAMES:
        url = name.join(where.rsplit("index.json", 1))
        try:
            content = fetch(url)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = str(error)
            continue
        except (OSError, ValueError) as error:
            reason = str(error)
            if not is_remote(where):
                raise ValueError(f"{url}: cannot be read ({error})") from error
            continue
        return _parse(content, url, where)
    if is_remote(where):
        raise ValueError(
            f"{prefix}: no index.json beside the shards ({reason}); write one with `lte-scale shards SOURCE OUT`, "
            "SOURCE being a local copy, and put it there"
        )
    return _Listing()


def _parse(content: bytes, url: str, where: str) -> _Listing:
    try:
        data = json.loads(content)
        found, classes = _own(data) if "format" in data else (_timm(data), ())
        shards: dict[str, Shard] = {}
        for name, samples, size, sha256 in found:
            place = name if is_remote(name) or name.startswith("/") else name.join(where.rsplit("index.json", 1))
            if not shard_name(name) or shard_name(name) in shards:
                raise ValueError(f"shard {name!r} is named twice or is no .tar")
            shards[shard_name(name)] = Shard(place, int(samples), int(size), str(sha256))
        return _Listing(shards, tuple(map(str, classes)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"{url}: is no index of shards ({reason}); rewrite it with `lte-scale shards`") from error


def _own(data: dict[str, Any]) -> tuple[list[tuple[str, int, int, str]], Sequence[str]]:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']} is not {FORMAT}")
    return [(s["name"], s["samples"], s.get("bytes", 0), s.get("sha256", "")) for s in data["shards"]], data["classes"]


def _timm(data: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """The shards of all splits in timm's `_info.json`: a pattern picks those of one split."""
    splits = data["splits"].values() if "splits" in data else [data]
    return [
        (name, count, 0, "")
        for split in splits
        for name, count in zip(split["filenames"], split["shard_lengths"], strict=True)
    ]
