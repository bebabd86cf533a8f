"""`lte-scale top`: which endpoints it asks, how, and the command itself."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from lte_scale.cli import main
from lte_scale.top.scrape import Fetcher, Scrape, Target, find, parse
from tests.certificates import self_signed
from tests.harness import free_port
from tests.test_top import page

ROOT = Path(__file__).parent.parent
NOW = 1_700_000_000.0


# Targets


@pytest.mark.parametrize(
    ("word", "url"),
    [
        ("host:9464", "http://host:9464/metrics"),
        ("host:9464/", "http://host:9464/metrics"),
        ("http://host/metrics", "http://host/metrics"),
        ("https://host:9464", "https://host:9464/metrics"),
        ("http://host:1/federate?match[]=x", "http://host:1/federate?match[]=x"),
        ("[::1]:9464", "http://[::1]:9464/metrics"),
    ],
)
def test_addresses(word: str, url: str) -> None:
    assert parse(word).url == url


def test_user_and_password_leave_the_url() -> None:
    assert parse("http://me:p%40ss@host:1") == Target("http://host:1/metrics", "host:1", "Basic bWU6cEBzcw==")


@pytest.mark.parametrize("word", ["runs/missing", "host", "file:///etc/passwd", "http://", "me:secret@host:port"])
def test_what_is_no_address(word: str) -> None:
    with pytest.raises(ValueError, match="neither the directory of a run nor an address such as") as refusal:
        find([word])
    assert "secret" not in str(refusal.value)


def announce(run_dir: Path, **ports: str) -> Path:
    """Endpoint files as the nodes of a run write them."""
    (run_dir / "endpoints").mkdir(parents=True, exist_ok=True)
    for name, address in ports.items():
        targets = [{"targets": [address], "labels": {"job": "demo"}}]
        (run_dir / "endpoints" / f"{name}.json").write_text(json.dumps(targets))
    return run_dir


def test_endpoints_of_a_run(tmp_path: Path) -> None:
    run_dir = announce(tmp_path, node0="a:1", node10="c:1", node2="b:1")
    labels = {"job": "demo", "__scheme__": "https"}
    (run_dir / "endpoints" / "node3.json").write_text(json.dumps([{"targets": ["d:1"], "labels": labels}]))
    (run_dir / "endpoints" / ".node4.json.tmp").write_text("[{")
    urls = [target.url for target in find([str(tmp_path), "a:1"])]
    assert urls == [f"{place}/metrics" for place in ("http://a:1", "http://b:1", "https://d:1", "http://c:1")]


@pytest.mark.parametrize("text", ["[{", "{}", '["a:1"]', '[{"targets": "a:1"}]', '[{"labels": {}}]'])
def test_endpoint_files_that_are_none(tmp_path: Path, text: str) -> None:
    (announce(tmp_path) / "endpoints" / "node0.json").write_text(text)
    with pytest.raises(ValueError, match=r"node0.json: no list of Prometheus targets|: no endpoints; give"):
        find([str(tmp_path)])


# Asking


def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def reply(request: Any, text: str, code: int = 200, **headers: str) -> None:
    request.send_response_only(code)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(text.encode())


@pytest.fixture
def fetch() -> Iterator[Fetcher]:
    fetcher = Fetcher(1.0)
    yield fetcher
    fetcher.close()


@pytest.fixture
def endpoint() -> Iterator[tuple[str, CollectorRegistry]]:
    """A server such as the nodes have."""
    registry = CollectorRegistry()
    Gauge("lte_step", "", ["node"], registry=registry).labels("3").set(40)
    Counter("lte_images", "", ["node"], registry=registry).labels("3").inc(1280)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}", registry
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetching(fetch: Fetcher, endpoint: tuple[str, CollectorRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    scrape = fetch(parse(endpoint[0]))
    assert isinstance(scrape, Scrape)
    assert (scrape.value("lte_step"), scrape.total("lte_images_total")) == (40.0, 1280.0)
    assert abs(scrape.time - time.time()) < 5


def test_ages_are_by_the_clock_of_the_node(fetch: Fetcher) -> None:
    for address in serve(lambda request: reply(request, page(0, 100, {}), Date="Tue, 14 Nov 2023 22:13:20 GMT")):
        scrape = fetch(parse(address))
    assert isinstance(scrape, Scrape)
    assert scrape.time == NOW


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: reply(request, "", 503), "HTTP 503 Service Unavailable"),
        (lambda request: reply(request, "up 1\n"), "answers, but with no metric of lte-scale"),
        (lambda request: reply(request, "<html>no</html>"), None),
        (lambda request: time.sleep(3), "timed out"),
        (lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"), "SSH-2.0-OpenSSH_9.6"),
        (lambda request: request.connection.shutdown(socket.SHUT_RDWR), None),
    ],
    ids=["503", "another exporter", "HTML", "slow", "ssh", "hangs up"],
)
def test_reasons_for_no_answer(fetch: Fetcher, answer: Callable[[Any], None], reason: str | None) -> None:
    for address in serve(answer):
        said = fetch(parse(address))
    assert isinstance(said, str)
    assert said and "\n" not in said
    assert reason is None or said == reason


def test_nobody_listens(fetch: Fetcher) -> None:
    assert fetch(parse(f"127.0.0.1:{free_port()}")) == "Connection refused"


def test_passwords(tmp_path: Path, fetch: Fetcher) -> None:
    """In the URL or in a file; never told to where a redirection leads."""
    heard: list[tuple[str, str | None]] = []

    def answer(request: Any) -> None:
        heard.append((request.path, request.headers.get("Authorization")))
        if request.path == "/metrics":
            reply(request, "", 302, Location="/elsewhere")
        else:
            reply(request, page(0, 100, {}))

    (tmp_path / "password").write_text("me:secret\n")
    with_file = Fetcher(1.0, password_file=str(tmp_path / "password"))
    for address in serve(answer):
        assert isinstance(fetch(parse(f"http://me:secret@{address}")), Scrape)
        assert isinstance(with_file(parse(address)), Scrape)
        assert isinstance(fetch(parse(address)), Scrape)
    with_file.close()
    basic = "Basic bWU6c2VjcmV0"
    assert [said for path, said in heard if path == "/metrics"] == [basic, basic, None]
    assert [said for path, said in heard if path == "/elsewhere"] == [None] * 3


def test_https(tmp_path: Path) -> None:
    both = str(self_signed(tmp_path))
    registry = CollectorRegistry()
    Gauge("lte_step", "", ["node"], registry=registry).labels("0").set(1)
    server, _ = start_http_server(0, "127.0.0.1", registry, certfile=both, keyfile=both)
    target = parse(f"https://127.0.0.1:{server.server_port}")
    said = []
    for cafile in (both, None):
        fetcher = Fetcher(2.0, cafile, certificate=both)
        said.append(fetcher(target))
        fetcher.close()
    server.shutdown()
    server.server_close()
    assert isinstance(said[0], Scrape)
    assert "certificate verify failed" in str(said[1])


@pytest.mark.parametrize("option", ["--cafile", "--cert", "--password-file"])
def test_files_that_are_missing(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "host:1", "--once", option, "missing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lte-scale: {option}: cannot read ")
    assert "missing" in line


# The command


def test_once(tmp_path: Path, endpoint: tuple[str, CollectorRegistry], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = announce(tmp_path, node0=endpoint[0], node1=f"127.0.0.1:{free_port()}")
    assert main(["top", str(run_dir), "--over", "0.1"]) == 0  # no terminal: once
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "step 40"
    assert [line.split()[0] for line in shown if line.startswith("3")] == ["3"]
    assert "\x1b" not in "".join(shown)
    assert shown[-1].endswith(": no answer: Connection refused")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["."], ".: no endpoints; give the directory of a running run with metrics.port set, or a node's URL"),
        (["PORT"], "no node answers (127.0.0.1:PORT: Connection refused); is the run alive"),
        (["PORT", "localhost:1"], "no node answers (127.0.0.1:PORT: Connection refused; 1 more); is the"),
        (["host:1", "--every", "0"], "--every: 0 is no number of seconds; give one above 0"),
        (["host:1", "--over", "nan"], "--over: nan is no number of seconds; give one above 0"),
    ],
)
def test_refusals(
    tmp_path: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    port = str(free_port())
    assert main(["top", *(f"127.0.0.1:{port}" if word == "PORT" else word for word in words), "--once"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lte-scale: {said.replace('PORT', port)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_live(tmp_path: Path, number: signal.Signals) -> None:
    """On a terminal: in place, over a change of ports, until a signal; the cursor comes back."""
    steps = iter(range(100, 10_000, 10))
    for address in serve(lambda request: reply(request, page(0, next(steps), {}))):
        run_dir = announce(tmp_path, node0=f"127.0.0.1:{free_port()}")
        terminal, inside = pty.openpty()
        top = subprocess.Popen(
            [sys.executable, "-m", "lte_scale", "top", str(run_dir), "--every", "0.05"],
            cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        os.close(inside)
        shown = io.StringIO()
        shown_until(terminal, shown, "no answer: Connection refused")
        announce(run_dir, node0=address)
        shown_until(terminal, shown, "step 1,150/2,200")
        top.send_signal(number)
        assert top.wait(timeout=20) == 0
        shown_until(terminal, shown, "\x1b[?25h")
        os.close(terminal)
    text = shown.getvalue()
    assert text.startswith("\x1b[?25l")
    assert "Traceback" not in text
    last = text.split("\x1b[H")[-1].replace("\x1b[K", "").splitlines()
    assert last[0] == "demo  vit_small  engine fsdp, base node, rank 16, 4 heads, merge every 50"


def shown_until(terminal: int, shown: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in shown.getvalue():
        assert time.monotonic() < deadline, shown.getvalue()
        shown.write(os.read(terminal, 65536).decode(errors="replace"))
