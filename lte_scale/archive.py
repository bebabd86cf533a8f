"""Tar shards wherever they are: opening, reading samples front to back, fetching, caching.

A sample is a run of consecutive members whose names agree up to the first dot of the last component, as in
WebDataset: `n01/00017.jpg`, `n01/00017.cls`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from filelock import FileLock

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF")
"""What is decoded, whatever the extension says: of all that PIL knows, EPS would start another program."""
BACKOFF_SECONDS = (0.5, 2.0)
_STALL_SECONDS = 30.0
_BLOCK_BYTES = 1 << 18
_META = re.compile(r"__[^/]*__($|/)")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_SHARD_NAME = re.compile(r"[^\s/'\"]+\.tar(\.\w+)?")
_MOST_BYTES = 1 << 30
"""Of one file of a sample: more is no image, but a header that lies, or holes that unpack to nothing but zeros."""


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme (`http:`, `s3:`, `pipe:`), as opposed to a path."""
    return re.match(r"[a-z][a-z0-9+.-]+:", url) is not None


def shard_name(url: str) -> str:
    """The file name in a path, URL or `pipe:` command; empty if it names no .tar."""
    if not url.startswith("pipe:"):
        url = urlsplit(url).path if is_remote(url) else url
    found = list(_SHARD_NAME.finditer(url))
    return found[-1][0] if found else ""


def beside(url: str, name: str) -> str:
    """Where the file `name` in the directory of shard `url` is: the same path, URL or command with another name."""
    return name.join(url.rsplit(shard_name(url), 1))


def members(tar: tarfile.TarFile) -> Iterator[tuple[int, str, str, tarfile.TarInfo]]:
    """Sample number, key, extension and header of every file that belongs to a sample. Links are none.

    Raises:
        tarfile.ReadError: where a header leads back in the archive (it would be read for ever) or to too much.
    """
    number, previous, end = -1, "", -1
    for member in tar:
        if not end < member.offset_data or member.size < 0:
            raise tarfile.ReadError("a header leads back in the archive")
        end = member.offset_data
        if member.size > _MOST_BYTES or member.issparse():
            raise tarfile.ReadError(f"a file of {member.size} bytes, or one with holes, is no part of a sample")
        match = _MEMBER.fullmatch(member.name)
        if match is None or not member.isfile() or _META.match(member.name):
            continue
        if match[1] != previous:
            number, previous = number + 1, match[1]
        yield number, match[1], match[2].lower(), member


def read_samples(url: str, numbers: Sequence[int]) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Number, key and content by extension of the samples `numbers` (ascending), read front to back.

    Ends early, without an error, where the shard holds fewer samples. Raises whatever a damaged or missing shard
    makes tarfile or the transport raise.
    """
    wanted, last = set(numbers), numbers[-1]
    current, key, files = -1, "", dict[str, bytes]()
    with open_tar(url) as tar:
        for number, name, extension, member in members(tar):
            if number != current:
                if current in wanted:
                    yield current, key, files
                if number > last:
                    return
                current, key, files = number, name, {}
            if number in wanted:
                content = tar.extractfile(member)
                assert content is not None
                files[extension] = content.read()
        if current in wanted:
            yield current, key, files


@contextmanager
def open_tar(url: str) -> Iterator[tarfile.TarFile]:
    """A shard, to be read sequentially; of a local one, what is not asked for is skipped by seeking."""
    if not is_remote(url):
        with tarfile.open(url, "r:") as tar:
            yield tar
        return
    stream = open_stream(url)
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK_BYTES) as tar:
            yield tar
    finally:
        # Who stops early breaks the pipe of the command behind a stream; that is no damage.
        with suppress(OSError):
            stream.close()


def open_stream(url: str) -> IO[bytes]:
    """Bytes of a remote file, from its beginning.

    HTTP is read here, because a stalled server must time out; `s3://` by the AWS command line (or fsspec with s3fs);
    everything else as webdataset's gopen does.

    Raises:
        OSError: FileNotFoundError or PermissionError where trying again is of no use.
    """
    scheme = url.split(":", 1)[0]
    if scheme in ("http", "https"):
        return _open_http(url)
    if scheme == "s3":
        return _open_s3(url)
    from webdataset.gopen import gopen

    return _typed(gopen(url))


def _open_http(url: str) -> IO[bytes]:
    try:
        return _typed(urllib.request.urlopen(url, timeout=_STALL_SECONDS))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP {error.code} {error.reason}") from error
        if error.code in (401, 403):
            raise PermissionError(f"HTTP {error.code} {error.reason}") from error
        raise OSError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error


def _open_s3(url: str) -> IO[bytes]:
    if shutil.which("aws"):
        from webdataset.gopen import Pipe

        return _typed(Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb", bufsize=_BLOCK_BYTES))
    if importlib.util.find_spec("s3fs"):
        import fsspec  # type: ignore[import-untyped]

        return _typed(fsspec.open(url, "rb").open())
    raise FileNotFoundError("s3:// needs the AWS command line (`aws`) or the Python package s3fs")


def _typed(stream: Any) -> IO[bytes]:
    return stream


def fetch(url: str) -> bytes:
    """All of a small file, local or remote.

    Raises:
        OSError: if it cannot be read; FileNotFoundError if it certainly is not there.
    """
    if not is_remote(url):
        return Path(url).read_bytes()
    for pause in (*BACKOFF_SECONDS, None):
        try:
            with open_stream(url) as stream:
                return stream.read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def cached(url: str, cache_dir: str, *, size: int = 0, sha256: str = "") -> str:
    """The path of the local copy of remote shard `url`, downloaded once by whichever process comes first.

    Args:
        size, sha256: what the index says of the shard, checked where known.

    Raises:
        OSError: if it cannot be downloaded whole.
    """
    digest = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{digest}-{shard_name(url)}"
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _download(url, path, size, sha256)
    return str(path)


def check_cache(cache_dir: str) -> None:
    """Create the directory of `cached`, if one is named.

    Raises:
        ValueError: if that is not possible.
    """
    if not cache_dir:
        return
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: cannot create {cache_dir} ({error.strerror}); name a directory you may write to"
        ) from error


def _download(url: str, path: Path, size: int, sha256: str) -> None:
    partial, digest = path.with_name(f"{path.name}.part"), hashlib.sha256()
    try:
        with open_stream(url) as stream, partial.open("wb") as file:
            size = size or int((getattr(stream, "headers", None) or {}).get("Content-Length") or 0)
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
        received = partial.stat().st_size
        if size and received != size:
            raise OSError(f"{received} of {size} bytes arrived")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("its checksum is not that of the index")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
