"""Shards by HTTP and from pipes: the batches of local files, also where a server fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lte_scale import archive, reading
from lte_scale.data import open_index
from lte_scale.index import Shard
from lte_scale.shards import write_shards
from tests.shard_files import CLASSES, write_lengths
from tests.streams import HERE, assert_same, stream, take


class Server(ThreadingHTTPServer):
    """Serves a directory. The first answer for a path in `failing` is an error; in `cut` it breaks off; in `stalling`
    it stands still for a minute."""

    def __init__(self, folder: Path) -> None:
        self.requested: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.cut: set[str] = set()
        self.stalling: set[str] = set()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                server.requested[name] += 1
                if name in server.failing:
                    server.failing.discard(name)
                    self.send_error(503)
                elif name in server.cut | server.stalling:
                    stalls = name in server.stalling
                    server.cut.discard(name)
                    server.stalling.discard(name)
                    content = (folder / name).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[:9000])
                    time.sleep(60.0 if stalls else 0.0)
                    self.close_connection = True
                else:
                    super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BACKOFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(reading, "BACKOFF_SECONDS", (0.01, 0.02))


@pytest.fixture
def server(tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """30 samples in three shards with an index, by HTTP."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_lengths(tmp_path / "raw", (10, 10, 10))
    write_shards(str(tmp_path / "raw"), tmp_path / "raw", workers=1)
    serving = Server(tmp_path / "raw")
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("pattern", ["/{00000..00002}.tar", "/", ""])
def test_http_streams_the_same_batches_as_local_files(tmp_path: Path, server: Server, pattern: str) -> None:
    index = open_index(server.url + pattern)
    local = open_index(str(tmp_path / "raw"))
    assert (index.samples, index.num_classes, index.lengths) == (30, CLASSES, local.lengths)
    expected = take(stream(local, batch_size=5), 7)
    for workers in (0, 2):
        assert_same(take(stream(index, batch_size=5, data=replace(HERE, workers=workers)), 7), expected)


def test_a_cache_downloads_each_shard_once(tmp_path: Path, server: Server) -> None:
    index = open_index(f"{server.url}/{{00000..00002}}.tar")
    data = replace(HERE, workers=2, cache_dir=str(tmp_path / "cache"))
    expected = take(stream(open_index(str(tmp_path / "raw")), batch_size=5), 13)
    server.requested.clear()
    server.failing = {"00001.tar"}
    server.cut = {"00002.tar"}
    assert_same(take(stream(index, batch_size=5, data=data), 13), expected)
    assert server.requested == Counter({"00000.tar": 1, "00001.tar": 2, "00002.tar": 2})
    assert sorted(p.name[-9:] for p in (tmp_path / "cache").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cached_shard_that_is_not_the_indexed_one_is_damage(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    shard = tmp_path / "raw" / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"000012", b"000021"))
    data = replace(HERE, shuffle_buffer=30, cache_dir=str(tmp_path / "cache"))
    batches = take(stream(index, batch_size=15, data=data), 2)
    names = [name for batch in batches for name in batch.bad]
    assert len(names) == 1
    assert "checksum" in names[0]


def test_a_stream_that_breaks_is_taken_up_where_it_broke(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    server.failing, server.cut = {"00000.tar"}, {"00001.tar"}
    batches = take(stream(index, batch_size=5), 6)
    assert [batch.bad for batch in batches] == [()] * 6
    assert_same(batches, take(stream(open_index(str(tmp_path / "raw")), batch_size=5), 6))


def test_a_stream_that_stalls_is_taken_up_where_it_stalled(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_STALL_SECONDS", 0.3)
    index = open_index(server.url)
    server.stalling = {"00001.tar"}
    began = time.monotonic()
    batches = take(stream(index, batch_size=5), 6)
    assert time.monotonic() - began < 50, "it waited for the server"
    assert [batch.bad for batch in batches] == [()] * 6
    assert_same(batches, take(stream(open_index(str(tmp_path / "raw")), batch_size=5), 6))


def test_a_shard_missing_on_the_server_is_named_and_survived(tmp_path: Path, server: Server) -> None:
    index = open_index(server.url)
    (tmp_path / "raw" / "00001.tar").unlink()
    batches = take(stream(index, batch_size=15, data=replace(HERE, shuffle_buffer=30)), 2)
    names = [name for batch in batches for name in batch.bad]
    assert names == [f"{server.url}/00001.tar: cannot be read from sample 0 of 10 on (HTTP 404 File not found)"]
    assert server.requested["00001.tar"] == 1, "what is not there is not asked for again"


@pytest.mark.usefixtures("impatient")
def test_pipes_run_only_when_allowed(tmp_path: Path) -> None:
    write_lengths(tmp_path, (10, 10))
    pattern = f"pipe:cat {tmp_path}/{{00000..00001}}.tar"
    with pytest.raises(ValueError, match=r"set data.allow_pipe=true"):
        open_index(pattern)
    with pytest.raises(ValueError, match=r"no index.json beside the shards"):
        open_index(pattern, allow_pipe=True)
    write_shards(str(tmp_path), tmp_path, workers=1)
    index = open_index(pattern, allow_pipe=True)
    assert_same(take(stream(index), 7), take(stream(open_index(str(tmp_path))), 7))
    gone = replace(index, shards=(Shard(f"pipe:cat {tmp_path}/gone.tar", 10), *index.shards[1:]))
    assert take(stream(gone, batch_size=20), 1)[0].damaged == 10
