"""Which shards there are and how many samples each holds: known before the first one is read.

    train/00000.tar ... 00059.tar
    train/index.json    {"format": 1, "classes": [...], "channels": 1,
                         "shards": [{"name", "samples", "bytes", "sha256"}, ...]}

Exact epochs, equal step counts and resuming all rest on these counts.
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
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
_MOST_SHARDS, _MOST_SAMPLES = 1_000_000, 100_000_000
"""In a pattern, and in one shard: beyond, a slip of the keyboard or a damaged index would fill the memory."""


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
    urls = _expanded(location)
    _refuse_pipes(urls, allow_pipe)
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
    _refuse_pipes((shard.url for shard in shards), allow_pipe)  # an index may name some, too
    index = ShardIndex(location, tuple(shards), next(iter(classes), ()))
    if not index.samples:
        raise ValueError(f"{location}: holds no samples; write shards with `lte-scale shards SOURCE OUT`")
    return index


def _expanded(location: str) -> list[str]:
    """What a pattern with braces stands for."""
    shards = 1  # braceexpand makes the whole of a range at once
    for content in re.findall(r"\{([^{}]*)\}", location):
        ends = re.match(r"(-?\d{1,18})\.\.(-?\d{1,18})", content)
        shards *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else content.count(",") + 1
    try:
        urls = list(itertools.islice(braceexpand(location), _MOST_SHARDS + 1)) if shards <= _MOST_SHARDS else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: unbalanced braces; write a range as {{00000..00009}}.tar") from error
    if not urls or len(urls) > _MOST_SHARDS:
        raise ValueError(f"{location}: stands for more than {_MOST_SHARDS} shards; write a shorter range")
    return urls


def _refuse_pipes(urls: Iterable[str], allowed: bool) -> None:
    if not allowed and (pipe := next((url for url in urls if url.startswith("pipe:")), None)):
        raise ValueError(f"{pipe}: a pipe runs a shell command; set data.allow_pipe=true to accept it")


def count_samples(path: str) -> int:
    """Samples in a local shard, from its headers; of a damaged one, those before the damage, with a warning."""
    count = 0
    try:
        with open_tar(path) as tar:
            for number, *_ in members(tar):
                count = number + 1
    except Exception as error:  # tarfile raises anything on damaged bytes
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
            if not shard_name(name) or shard_name(name) in shards:
                raise ValueError(f"shard {name!r} is named twice or is no .tar")
            shards[shard_name(name)] = Shard(
                _place(name, where), _count(samples, _MOST_SAMPLES), _count(size, 1 << 50), str(sha256)
            )
        if not isinstance(classes, list | tuple):
            raise ValueError("its classes are no list")
        return _Listing(shards, tuple(map(str, classes)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"{url}: is no index of shards ({reason}); rewrite it with `lte-scale shards`") from error


def _place(name: str, where: str) -> str:
    """Where the shard is that the index at `where` names. An index from afar names nothing on this machine."""
    if is_remote(name) or (name.startswith("/") and not is_remote(where)):
        return name
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"shard {name!r} is not beside the index")
    return name.join(where.rsplit("index.json", 1))


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:30]} is no whole number from 0 to {most}")
    return value


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
