"""`lte-scale top`: lines from what endpoints say, and the asking of endpoints."""

from __future__ import annotations

import io
import json
import os
import pty
import re
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
from lte_scale.metrics.catalogue import METRICS
from lte_scale.top.figures import duration, size
from lte_scale.top.node import Reading
from lte_scale.top.scrape import Fetcher, Scrape, Target, find, parse, read
from lte_scale.top.view import lines

ROOT = Path(__file__).parent.parent
NOW = 1_700_000_000.0

Values = dict[str, float]
SECONDS = {"data_wait": 0.01, "forward": 0.05, "backward": 0.1, "collectives": 0.01, "optimizer": 0.01, "merge": 0.02}
INFO = 'run="demo",model="vit_small",engine="fsdp",base_scope="node",rank="16",merge_every="50",heads="4"'
INTER_NODE = 'lte_network_bytes_total{scope="inter_node",purpose="merge_factor"}'


def page(node: int, steps: int, changed: Values) -> str:
    """What a node of two ranks says after some steps of 0.2 s; `changed` sets the values of series."""
    first, second = 2 * node, 2 * node + 1
    values: Values = {
        f"lte_config_info{{{INFO}}}": 1,
        "lte_start_timestamp_seconds": NOW - 100, "lte_step": 1000 + steps, "lte_planned_steps": 2200,
        "lte_remaining_seconds": 3725, "lte_images_per_second": 640, "lte_steps_total": steps,
        "lte_images_total": 128 * steps, INTER_NODE: 1.28e6 * steps,
        'lte_network_bytes_total{scope="intra_node",purpose="base"}': 1e12, "lte_mfu_ratio": 0.415,
        "lte_step_seconds_sum": 0.2 * steps, "lte_step_seconds_count": steps,
        'lte_memory_bytes{local_rank="0",kind="peak"}': 10e9, 'lte_memory_bytes{local_rank="1",kind="peak"}': 12.34e9,
        'lte_memory_bytes{local_rank="1",kind="reserved"}': 99e9, "lte_learning_rate": 1e-3,
        f'lte_loss{{head="{first}"}}': 2.0, f'lte_loss{{head="{second}"}}': 2.5,
        f'lte_top1_ratio{{head="{first}"}}': 0.5, "lte_bad_samples_total": 0, "lte_bad_shards_total": 0,
        f'lte_skipped_steps_total{{head="{first}"}}': 0, 'lte_checkpoints_total{result="failed"}': 0,
        "lte_checkpoint_timestamp_seconds": NOW - 70,
    }  # fmt: skip
    for rank in (0, 1):
        values[f'lte_rank_step{{local_rank="{rank}"}}'] = 1000 + steps
        values[f'lte_rank_step_timestamp_seconds{{local_rank="{rank}"}}'] = NOW - 1
        for name, seconds in SECONDS.items():
            values[phase(name, rank)] = seconds * steps
    unknown = [key for key in changed if key.partition("{")[0] not in named_metrics()]
    assert not unknown
    values |= changed
    return "".join(f"{labelled(key, node)} {value}\n" for key, value in values.items())


def named_metrics() -> set[str]:
    """Those of the catalogue, as an endpoint names them."""
    histograms = [name for name, metric in METRICS.items() if metric.kind == "histogram"]
    return {*METRICS, *(name + end for name in histograms for end in ("_sum", "_count"))}


def labelled(series: str, node: int) -> str:
    name, _, rest = series.partition("{")
    return f'{name}{{node="{node}",{rest or "}"}'


def reading(node: int, changed: Values | None = None, *, steps: int = 100, before: int = 0) -> Reading:
    earlier = read(page(node, before, {}), NOW - 20) if before else None
    return Reading(f"host{node}:9464", read(page(node, steps, changed or {}), NOW), earlier)


def phase(name: str, rank: int = 0) -> str:
    return f'lte_rank_phase_seconds_total{{local_rank="{rank}",phase="{name}"}}'


def marked(shown: list[str]) -> list[str]:
    """The lines of problems."""
    return [line for line in shown if line.startswith("!")]


def test_every_metric_shown_is_in_the_catalogue() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "lte_scale" / "top").glob("*.py"))
    asked = set(re.findall(r"[\"'](lte_[a-z0-9_]+)[\"']", sources))
    assert len(asked) >= 28
    assert not asked - named_metrics()


def test_a_run_of_two_nodes() -> None:
    slow = {phase("backward", rank): 14.0 for rank in (0, 1)}
    assert lines([reading(1, slow), reading(0)], 140) == [
        "demo  vit_small  engine fsdp, base node, rank 16, 4 heads, merge every 50",
        "step 1,100/2,200 [###############---------------] 50.0 %  left 1:02:05",
        "loss 2.250  top-1 50.0 %  held-out top-1 -  lr 1.00e-03  images/s 1,280",
        "",
        "node  images/s  step ms   data   merge  fwd+bwd     MFU     peak  sent/s  sent/image  skipped  bad  last step"
        "  checkpoint",
        "0          640    200.0  5.0 %  10.0 %   75.0 %  41.5 %  12.3 GB  6.4 MB     10.0 kB        0    0        1 s"
        "        1:10",
        "1 *        640    200.0  4.2 %   8.3 %   79.2 %  41.5 %  12.3 GB  6.4 MB     10.0 kB        0    0        1 s"
        "        1:10",
        "",
        "* node 1 is the slowest: 210.0 ms a step of its own work, the fastest takes 170.0 ms",
    ]


def test_narrow_terminals_lose_the_least_important_columns() -> None:
    readings = [reading(0), reading(1, {"lte_bad_samples_total": 7}), Reading("host2:9464", reason="timed out")]
    for width in (40, 60, 80, 100, 200):
        shown = lines(readings, width)
        assert max(map(len, shown)) <= width
    narrow = [line for line in lines(readings, 80) if line.startswith(("node", "0"))]
    assert narrow == [
        "node  images/s  step ms   data   merge  fwd+bwd     MFU  sent/image  last step",
        "0          640    200.0  5.0 %  10.0 %   75.0 %  41.5 %     10.0 kB        1 s",
    ]


def test_many_nodes_in_a_low_terminal() -> None:
    readings = [reading(node, {phase("backward"): 10.0 + node % 30}) for node in range(40)]
    shown = lines(readings, 80, 16)
    assert len(shown) <= 16
    assert [line.split()[0] for line in shown[5:8]] == ["29", "28", "27"]
    assert "... and 33 nodes more; those above are the slowest" in shown
    assert len(lines(readings, 80, 3)) == 3


def test_a_run_that_has_just_begun() -> None:
    now = read(labelled("lte_start_timestamp_seconds", 0) + f" {NOW}\n", NOW)
    assert lines([Reading("host:1", now)], 80) == [
        "no step ended yet",
        "loss -  top-1 -  held-out top-1 -  lr -  images/s -",
        "",
        "node      images/s  step ms  data  merge  fwd+bwd  MFU  sent/image  last step",
        "host:1           -        -     -      -        -    -           -          -",
    ]


def test_a_mark_needs_a_difference() -> None:
    assert not [line for line in lines([reading(0), reading(1)], 80) if "slowest" in line]


def test_heads() -> None:
    health: Values = {
        "lte_head_cosine_mean": 0.125, "lte_head_cosine_max": 0.3, "lte_merged_delta_effective_rank": 40.0,
        "lte_merged_delta_rank_ratio": 0.6, 'lte_head_delta_norm{head="0"}': 1.5, 'lte_head_delta_norm{head="1"}': 2.5,
    }  # fmt: skip
    assert lines([reading(0, health)], 200)[-1] == (
        "heads: cosine 0.125  (max 0.300)  effective rank 40.0  (60.0 % of the highest)  delta norm 1.5 to 2.5"
    )


def row(reading: Reading) -> dict[str, str]:
    """The cells of a node, by title."""
    titles, cells = (re.split(r"  +", line) for line in lines([reading], 200) if line.startswith(("node", "0 ")))
    return dict(zip(titles, cells, strict=True))


def test_times_and_bytes_are_of_the_last_steps() -> None:
    """As many seconds of waiting in steps 50 to 100 as in all of them."""
    waited = {phase("data_wait", rank): 0.5 + 5.0 for rank in (0, 1)}
    assert row(reading(0, waited, before=50))["data"] == "34.5 %"
    assert row(reading(0, waited))["data"] == "22.4 %"
    sent: Values = {INTER_NODE: 1.28e8}
    assert row(reading(0, sent, before=50))["sent/image"] == "10.0 kB"


def test_a_node_without_a_new_step_has_its_averages_since_the_start() -> None:
    assert row(reading(0, before=100)) == row(reading(0))


def test_a_process_that_began_anew_counts_from_zero() -> None:
    """Whether its start says so or its counters do."""
    anew: Values = {"lte_start_timestamp_seconds": NOW - 5}
    assert row(reading(0, anew, before=90)) == row(reading(0))
    before, after = (read(page(0, steps, {}), NOW) for steps in (100, 30))
    assert after.since(before).total("lte_steps_total") == 30


def test_problems() -> None:
    wrong: Values = {
        'lte_loss{head="0"}': float("nan"), 'lte_loss{head="11"}': float("inf"), 'lte_loss{head="2"}': float("nan"),
        'lte_skipped_steps_total{head="0"}': 3, "lte_bad_samples_total": 12, "lte_bad_shards_total": 1,
        'lte_checkpoints_total{result="failed"}': 2, phase("data_wait", 1): 40.0,
    }  # fmt: skip
    readings = [reading(0, wrong), reading(1), Reading("host2:9464", reason="Connection refused")]
    assert marked(lines(readings, 200)) == [
        "! host2:9464: no answer: Connection refused",
        "! node 0: the loss of head 0, 2, 11 is not finite",
        "! node 0: steps skipped for a loss or gradient that is not finite: 3 of head 0",
        "! node 0: damaged data skipped: samples 12, whole shards 1",
        "! node 0: checkpoints that failed: 2; the reason is in the run's events.log",
        "! node 0: waits for data 51.9 % of its time: raise data.workers, or use faster storage",
    ]
    assert lines(readings, 200)[2].startswith("loss 2.333 ")  # of those that have one
    assert not marked(lines([reading(0), reading(1)], 200))


def silent(rank: int, step: int, seconds: float) -> Values:
    return {
        f'lte_rank_step{{local_rank="{rank}"}}': step,
        f'lte_rank_step_timestamp_seconds{{local_rank="{rank}"}}': NOW - seconds,
    }


@pytest.mark.parametrize(
    ("silences", "said"),
    [
        (
            silent(1, 1099, 250) | silent(0, 1100, 249),
            ["node 0: rank 1", "4:10, at step 1,099 where others have ended"],
        ),
        (silent(1, 1100, 250) | silent(0, 1100, 250), ["node 0: rank 0, 1", "4:10, at step 1,100 like all others"]),
        (silent(1, 2200, 250) | silent(0, 2200, 250), []),
        (silent(1, 1099, 50), []),
    ],
    ids=["one behind", "all alike", "run has ended", "not for long"],
)
def test_ranks_that_have_ended_no_step_for_long(silences: Values, said: list[str]) -> None:
    found = marked(lines([reading(0, silences)], 200))
    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)


def test_slow_steps_are_not_silence() -> None:
    slow: Values = silent(0, 1100, 250) | silent(1, 1100, 250) | {"lte_step_seconds_sum": 2600.0}
    assert not marked(lines([reading(0, slow)], 200))


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (245, "4:05"), (11045, "3:04:05"), (183900, "2 d 03:05"), (float("inf"), "?")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(x) for x in (None, 0, 999, 1000, 999_949, 999_951, 3e9, 2e15)] == [
        "-", "0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "3.0 GB", "2000.0 TB",
    ]  # fmt: skip


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


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
    both = str(tmp_path / "both.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        subprocess.run([*command.split(), "-keyout", both, "-out", f"{both}.crt"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    Path(both).write_text(Path(both).read_text() + Path(f"{both}.crt").read_text())
    registry = CollectorRegistry()
    Gauge("lte_step", "", ["node"], registry=registry).labels("0").set(1)
    server, _ = start_http_server(0, "127.0.0.1", registry, certfile=both, keyfile=both)
    target = parse(f"https://127.0.0.1:{server.server_port}")
    said = []
    for cafile in (f"{both}.crt", None):
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
