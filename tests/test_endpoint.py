"""What a node's ranks count, what its endpoint serves, who may read it, and how Prometheus finds it."""

from __future__ import annotations

import base64
import json
import logging
import math
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from lte_scale.collectives import Collectives
from lte_scale.config.schema import Config, MetricsConfig
from lte_scale.metrics.board import open_board
from lte_scale.metrics.catalogue import LABELS, METRICS, PHASES
from lte_scale.metrics.endpoint import Endpoint, make_directory
from lte_scale.metrics.instruments import Instruments
from lte_scale.topology import Topology
from tests.certificates import self_signed
from tests.records import RECORD

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
OTHER_RANK = """
import sys, time
from pathlib import Path
from lte_scale.metrics.instruments import Instruments
i = Instruments(Path(sys.argv[1]), node=1, local_rank=1)
i.count("lte_images_total", 100)
i.observe("lte_step_phase_seconds", 0.2, "forward")
i.set("lte_rank_step", 7, "1")
print("ready", flush=True)
sys.stdin.read()
"""


def read(url: str, **headers: str) -> Samples:
    request = urllib.request.Request(url, headers=headers)
    text = urllib.request.urlopen(request, timeout=5).read().decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({"node": "1", **labels}.items()))]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Endpoint, Instruments]]]:
    opened: list[Endpoint] = []

    def start(**keys: Any) -> tuple[Endpoint, Instruments]:
        directory = make_directory()
        assert directory is not None
        opened.append(Endpoint(MetricsConfig(**keys), directory, node=1, run_dir=tmp_path / "run"))
        return opened[-1], Instruments(directory, node=1, local_rank=0)

    yield start
    for endpoint in opened:
        endpoint.close()


def test_ranks_are_added_up_and_dead_ones_keep_only_their_counts(serve: Callable[..., Any]) -> None:
    endpoint, mine = serve()
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_RANK, str(endpoint.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == b"ready\n"
    mine.count("lte_images_total", 20)
    mine.observe("lte_step_phase_seconds", 0.04, "forward")
    mine.set("lte_rank_step", 8, "0")
    mine.set("lte_loss", math.nan, "3")
    seen = read(endpoint.url)
    assert value(seen, "lte_images_total") == 120
    assert value(seen, "lte_step_phase_seconds_count", phase="forward") == 2
    assert value(seen, "lte_step_phase_seconds_sum", phase="forward") == pytest.approx(0.24)
    assert value(seen, "lte_step_phase_seconds_bucket", phase="forward", le="0.05") == 1
    assert value(seen, "lte_rank_step", local_rank="0") == 8 and value(seen, "lte_rank_step", local_rank="1") == 7
    assert math.isnan(value(seen, "lte_loss", head="3"))
    other.stdin.close()
    other.wait(30)
    seen = read(endpoint.url)
    assert value(seen, "lte_images_total") == 120
    assert ("lte_rank_step", (("local_rank", "1"), ("node", "1"))) not in seen
    assert value(seen, "lte_rank_step", local_rank="0") == 8


def test_a_board_shows_all_that_a_record_and_the_clocks_hold(tmp_path: Path, pool4: Any) -> None:
    for seen in pool4.run(board, str(tmp_path), world_size=1, ranks_per_node=1):
        node = {"node": "0"}

        def at(name: str, **labels: str) -> float:
            return seen[name, tuple(sorted({**node, **labels}.items()))]  # noqa: B023

        assert at("lte_images_total") == 640 and at("lte_steps_total") == 20 and at("lte_windows_total") == 2
        assert at("lte_step") == 1200 and at("lte_planned_steps") == 5000 and at("lte_restarts") == 3
        assert at("lte_loss", head="0") == 1.2 and at("lte_top1_ratio", head="1") == 0.6
        assert at("lte_gradient_norm", head="1") == 0.9 and at("lte_head_delta_norm", head="1") == 0.5
        assert at("lte_eval_top1_ratio") == 0.9 and at("lte_head_cosine_mean") == 0.25
        assert at("lte_rank_phase_seconds_total", local_rank="0", phase="merge") == 0.5
        assert at("lte_step_seconds_sum") == pytest.approx(3.5) and at("lte_step_seconds_count") == 2
        assert at("lte_merge_seconds_count", scope="global", path="dense") == 2
        assert at("lte_merge_seconds_sum", scope="global", path="dense") == pytest.approx(0.75)
        assert at("lte_collective_seconds_count", scope="inter_node", purpose="merge_dense") == 2
        assert at("lte_network_bytes_total", scope="inter_node", purpose="merge_dense") == 1000
        assert at("lte_full_rank_bytes_total") == 5e6 and at("lte_remaining_seconds") == 9
        assert at("lte_checkpoints_total", result="written") == 1
        assert at("lte_checkpoints_total", result="failed") == 1 and at("lte_checkpoint_step") == 1000
        assert at("lte_memory_bytes", local_rank="0", kind="peak") > 1e7
        names = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in seen}
        sensors = {"lte_accelerator_power_watts", "lte_accelerator_temperature_celsius"}
        assert names == set(METRICS) - sensors
        for name, labels in seen:
            metric = METRICS.get(name) or METRICS[name.rpartition("_")[0]]
            assert {label for label, _ in labels} - {"le"} == {"node", *metric.labels}, name


def board(rank: int, run_dir: str) -> Samples:
    topology = Topology(heads_per_node=2)
    collectives = Collectives(topology)
    config = Config(run_dir=run_dir, metrics=MetricsConfig(port=18_400))
    shown = open_board(config, collectives, torch.device("cpu"), accelerator="cpu", peak_flops=1e12)
    assert shown is not None and shown.endpoint is not None
    shown.started(5, 5000, 3)
    shown.stepped(6)
    collectives.bytes_sent["inter_node", "merge_dense"] = 1000
    merges = [(0, ("global", "dense"), 0.25), (0, ("global", "dense"), 0.25), (1, ("global", "dense"), 0.25)]
    calls = [(0, ("inter_node", "merge_dense"), 0.1)] * 2
    laps = {
        0: {"forward": 1.0, "backward": 1.0, "collectives": 0.1, "evaluate": 9.0},
        1: {"forward": 0.9, "merge": 0.5},
    }
    shown.timed(laps, merges, calls)
    health: dict[str, Any] = {"head_delta_norm": [0.4, 0.5], "head_cosine_mean": 0.25, "head_cosine_max": 0.25}
    record = replace(
        RECORD, **health, delta_effective_rank=3.0, delta_rank_ratio=0.1, eval_top1=0.9, eval_top5=1.0, eval_loss=0.1,
        mfu=0.4,
    )  # fmt: skip
    shown.show(record, top1_by_head=[0.5, 0.6], images=640, steps=20, flops=1e9, full_rank_bytes=5e6, seconds_left=9.0)
    shown.checkpointed(1000, 1.5)
    shown.checkpointed(1100, None)
    shown.count("lte_skipped_steps_total", 1, "0")
    samples = read(shown.endpoint.url)
    shown.close()
    shown.close()
    return samples


def test_every_label_is_described() -> None:
    bounded = {label for name, metric in METRICS.items() if not name.endswith("_info") for label in metric.labels}
    assert bounded == set(LABELS) - {"node"}
    assert all(name.endswith("_total") == (metric.kind == "counter") for name, metric in METRICS.items())
    assert all(name.endswith("_seconds") for name, metric in METRICS.items() if metric.kind == "histogram")
    assert "forward" in PHASES


def test_a_port_in_use_moves_on_and_close_frees_it(
    serve: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = serve(port=18_300, job="vit", discovery_dir=str(tmp_path / "targets"))
    with caplog.at_level(logging.INFO, logger="lte_scale"):
        second, _ = serve(port=first.port)
    assert first.port < second.port
    assert f"metrics.port {first.port} is in use: node 1 serves {second.url}" in caplog.text
    found = json.loads((tmp_path / "targets" / "vit-node1.json").read_text())
    assert found == [{"targets": [f"127.0.0.1:{first.port}"], "labels": {"job": "vit"}}]
    found = json.loads((tmp_path / "run" / "endpoints" / "node1.json").read_text())
    assert found == [{"targets": [f"127.0.0.1:{second.port}"], "labels": {"job": "run"}}]
    first.close()
    first.close()
    assert list((tmp_path / "targets").iterdir()) == [] and not first.directory.exists()
    with pytest.raises(urllib.error.URLError):
        read(first.url)
    with socket.create_server(("127.0.0.1", first.port)):
        pass


@pytest.mark.parametrize("address", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(serve: Callable[..., Any], tmp_path: Path, address: str) -> None:
    with pytest.raises(
        ValueError, match=rf"metrics\.address: cannot listen on {address}:9400 \(.+\); use 127"
    ) as caught:
        serve(address=address, port=9400)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_no_free_port_is_one_message(serve: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 65535))
            taken.listen()
        except OSError:
            pass  # taken by someone else: as good
        with pytest.raises(ValueError, match=r"metrics\.port: 65535 to 65535 are all in use on 127\.0\.0\.1"):
            serve(port=65535)


def test_a_password_and_a_certificate(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "password").write_text("night:shift\n")
    certificate = self_signed(tmp_path)
    endpoint, instruments = serve(password_file=str(tmp_path / "password"), certificate=str(certificate))
    instruments.count("lte_images_total", 5)
    context = ssl.create_default_context(cafile=str(certificate))

    def fetch(user: str) -> bytes:
        request = urllib.request.Request(
            endpoint.url, headers={"Authorization": "Basic " + base64.b64encode(user.encode()).decode()}
        )
        answer: bytes = urllib.request.urlopen(request, timeout=5, context=context).read()
        return answer

    assert endpoint.url.startswith("https://127.0.0.1:")
    assert b'lte_images_total{node="1"} 5.0' in fetch("night:shift")
    for wrong in ("night:", "day:shift", ""):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(wrong)
    found = json.loads((tmp_path / "run" / "endpoints" / "node1.json").read_text())
    assert found[0]["labels"] == {"job": "run", "__scheme__": "https"}
    for keys, message in (
        ({"password_file": str(tmp_path / "none")}, r"metrics\.password_file: cannot read"),
        ({"password_file": str(certificate)}, r"metrics\.password_file: .* does not hold a line user:password"),
        ({"certificate": str(tmp_path / "none")}, r"metrics\.certificate, key, client_ca: "),
    ):
        with pytest.raises(ValueError, match=message):
            serve(**keys)


def test_no_directory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert make_directory() is None
    assert "no metrics for Prometheus from" in caplog.text and "training goes on" in caplog.text


def test_pushes_and_takes_back(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    got: list[tuple[str, str, bytes]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            got.append((self.command, self.path, body))
            self.send_response(202)
            self.end_headers()

        do_DELETE = do_PUT

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint, instruments = serve(
            pushgateway=f"http://127.0.0.1:{server.server_port}", push_seconds=0.05, job="vit", port=18_310
        )
        instruments.count("lte_images_total", 5)
        while not any(b'lte_images_total{node="1"} 5.0' in body for _, _, body in got):
            time.sleep(0.01)
        endpoint.close()
        server.shutdown()
    assert {path for _, path, _ in got} == {"/metrics/job/vit/node/1"}
    assert got[-1][0] == "DELETE" and "WARNING" not in caplog.text


def test_a_gateway_that_does_not_answer_is_one_warning(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, _ = serve(pushgateway="http://127.0.0.1:9", push_seconds=0.02, port=18_320)
    while "does not answer" not in caplog.text:
        time.sleep(0.01)
    endpoint._pusher._ended.wait(0.2)  # type: ignore[union-attr]
    endpoint.close()
    assert caplog.text.count("metrics.pushgateway: http://127.0.0.1:9 does not answer") == 1


def test_metrics_of_others_in_this_process_stay_theirs(serve: Callable[..., Any]) -> None:
    endpoint, instruments = serve()
    instruments.count("lte_images_total", 3)
    theirs = Counter("theirs", "Of another library.", ["kind"], registry=CollectorRegistry())
    theirs.labels("any").inc(2)
    instruments.count("lte_skipped_steps_total", 1, "0")
    assert not any("theirs" in name for name, _ in read(endpoint.url))
    endpoint.close()
    theirs.labels("other").inc()
    assert [s.value for family in theirs.collect() for s in family.samples if s.name == "theirs_total"] == [2, 1]
