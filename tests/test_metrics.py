"""metrics.jsonl, the progress line, the Prometheus endpoint, peaks, and the events of the log."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lte_scale import log as logs
from lte_scale.log import log, setup
from lte_scale.metrics import Endpoint, JsonlWriter, Record, format_progress, peak_tflops

RECORD = Record(
    step=1200, epoch=3.21, images=153_600, loss=1.2344, top1=0.567, lr=1e-3, grad_norm=0.8, images_per_second=12_345.4,
    step_seconds=0.03, data_wait_seconds=1.5, merge_seconds=0.123, inter_node_bytes=4_700_000,
    intra_node_bytes=90_000_000, mfu=None, heads=8, skipped_steps=0, bad_samples=2,
)  # fmt: skip
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scrape(endpoint: Endpoint) -> Samples:
    with urllib.request.urlopen(f"http://{endpoint.host_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({"node": "1", **labels}.items()))]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    endpoint = Endpoint("127.0.0.1", 0, node=1, run_dir=tmp_path)
    yield endpoint
    endpoint.close()


@pytest.fixture
def clean_log() -> Iterator[None]:
    level = log.level
    yield
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


# metrics.jsonl


def test_a_record_is_one_line_of_plain_json(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(replace(RECORD, loss=math.nan, grad_norm=math.inf))
    writer.write(replace(RECORD, step=1210, eval_top1=0.9, eval_top5=0.99, eval_loss=0.4))
    plain, evaluated = lines(tmp_path / "metrics.jsonl")
    assert plain["loss"] is None and plain["grad_norm"] is None and plain["mfu"] is None
    assert not any(key.startswith("eval_") for key in plain)
    assert {"step", "epoch", "images", "top1", "lr", "images_per_second", "step_seconds", "data_wait_seconds"} < set(
        plain
    )
    assert {"merge_seconds", "inter_node_bytes", "intra_node_bytes", "heads", "skipped_steps"} < set(plain)
    assert (evaluated["eval_top1"], evaluated["eval_top5"], evaluated["eval_loss"]) == (0.9, 0.99, 0.4)


def test_rewind_forgets_later_and_torn_lines_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.rewind(0)
    assert not path.exists()
    for step in (10, 20, 30):
        writer.write(replace(RECORD, step=step))
    with path.open("a") as file:
        file.write('{"step": 15, "los')
    writer.rewind(20)
    writer.write(replace(RECORD, step=25))
    assert [line["step"] for line in lines(path)] == [10, 20, 25]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    writer.rewind(0)
    assert path.read_bytes() == b""


# progress


def test_the_progress_line() -> None:
    assert format_progress(RECORD, 4000, 754) == (
        "step 1,200/4,000  epoch 3.2  loss 1.234  top-1 56.7 %  12,345 images/s  merge 0.12 s  inter-node 4.7 MB  "
        "left 0:12:34"
    )
    early = replace(RECORD, step=10, inter_node_bytes=0, loss=math.nan)
    assert format_progress(early, 4000, math.inf).startswith("step    10/4,000  epoch 3.2  loss nan")
    assert format_progress(early, 4000, math.inf).endswith("inter-node 0 B  left ?")
    assert format_progress(RECORD, 4000, 100 * 3600 + 61).endswith("left 100:01:01")
    evaluated = replace(RECORD, eval_top1=0.953, eval_top5=0.997, eval_loss=0.21)
    assert format_progress(evaluated, 4000, 0).endswith("left 0:00:00  | eval top-1 95.3 %  top-5 99.7 %  loss 0.210")


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")]
)
def test_bytes_in_the_progress_line(count: float, text: str) -> None:
    assert f"inter-node {text}  " in format_progress(replace(RECORD, inter_node_bytes=int(count)), 4000, 0)


# endpoint


def test_what_a_scrape_sees(endpoint: Endpoint) -> None:
    empty = scrape(endpoint)
    assert value(empty, "lte_images_total") == 0 and value(empty, "lte_merges_total", scope="global") == 0
    assert not any(name in ("lte_loss", "lte_mfu_ratio") for name, _ in empty)

    endpoint.merged("local", 0.25)
    endpoint.merged("global", 0.5)
    endpoint.merged("global", 0.25)
    sent = {("inter_node", "merge"): 4_700_000, ("intra_node", "gather"): 90_000_000}
    endpoint.update(replace(RECORD, step=10, images=1280, loss=math.nan), sent)
    endpoint.update(
        replace(RECORD, step=30, images=3840, mfu=0.41, eval_top1=0.9, eval_top5=0.99, skipped_steps=3),
        {**sent, ("inter_node", "merge"): 9_400_000},
    )
    seen = scrape(endpoint)
    assert value(seen, "lte_images_total") == 3840
    assert value(seen, "lte_steps_total") == value(seen, "lte_step") == 30
    assert value(seen, "lte_merges_total", scope="local") == 1
    assert value(seen, "lte_merges_total", scope="global") == 2
    assert value(seen, "lte_merge_seconds_total", scope="global") == 0.75
    assert value(seen, "lte_network_bytes_total", scope="inter_node", purpose="merge") == 9_400_000
    assert value(seen, "lte_network_bytes_total", scope="intra_node", purpose="gather") == 90_000_000
    assert value(seen, "lte_step_seconds_count") == 30
    assert value(seen, "lte_step_seconds_sum") == pytest.approx(0.9)
    assert value(seen, "lte_step_seconds_bucket", le="0.025") == 0
    assert value(seen, "lte_step_seconds_bucket", le="0.05") == 30
    gauges = {
        "lte_images_per_second": 12_345.4, "lte_loss": 1.2344, "lte_top1_ratio": 0.567, "lte_learning_rate": 1e-3,
        "lte_gradient_norm": 0.8, "lte_mfu_ratio": 0.41, "lte_eval_top1_ratio": 0.9, "lte_eval_top5_ratio": 0.99,
        "lte_data_wait_seconds_total": 1.5, "lte_skipped_steps_total": 3, "lte_bad_samples_total": 2,
    }  # fmt: skip
    assert {name: value(seen, name) for name in gauges} == gauges
    (build,) = [dict(labels) for name, labels in seen if name == "lte_build_info"]
    assert build["node"] == "1" and re.match(r"\d+\.\d+", build["torch"])
    assert all(name.startswith("lte_") and dict(labels)["node"] == "1" for name, labels in seen)
    assert not any(name.endswith("_created") for name, _ in seen)


def test_counters_never_fall(endpoint: Endpoint) -> None:
    before = scrape(endpoint)
    for step, images, sent in ((10, 100, 7), (20, 200, 9), (20, 150, 8), (30, 210, 9)):
        endpoint.update(replace(RECORD, step=step, images=images), {("inter_node", "merge"): sent})
        after = scrape(endpoint)
        counters = [key for key in before if key[0].endswith(("_total", "_count", "_bucket"))]
        assert len(counters) > 5 and all(after[key] >= before[key] for key in counters)
        before = after
    assert value(before, "lte_images_total") == 210
    assert value(before, "lte_network_bytes_total", scope="inter_node", purpose="merge") == 9


def test_a_resumed_run_counts_from_zero(endpoint: Endpoint) -> None:
    endpoint.resume(step=1000, images=128_000, data_wait_seconds=1.0)
    endpoint.update(replace(RECORD, step=1010, images=129_280), {})
    seen = scrape(endpoint)
    assert value(seen, "lte_images_total") == 1280
    assert value(seen, "lte_steps_total") == value(seen, "lte_step_seconds_count") == 10
    assert value(seen, "lte_step") == 1010
    assert value(seen, "lte_data_wait_seconds_total") == 0.5


def test_a_port_in_use_moves_on_and_close_frees_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Endpoint("127.0.0.1", 0, node=0, run_dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="lte_scale"):
        second = Endpoint("127.0.0.1", first.port, node=1, run_dir=tmp_path)
    try:
        assert first.port < second.port
        assert f"metrics.port {first.port} is in use: node 1 serves http://{second.host_port}/metrics" in caplog.text
        assert (tmp_path / "endpoints" / "node0").read_text() == f"127.0.0.1:{first.port}\n"
        assert (tmp_path / "endpoints" / "node1").read_text() == f"127.0.0.1:{second.port}\n"
        assert scrape(first) != scrape(second)
    finally:
        first.close()
        second.close()
    first.close()
    assert list((tmp_path / "endpoints").iterdir()) == []
    with pytest.raises(urllib.error.URLError):
        scrape(first)
    with socket.create_server(("127.0.0.1", second.port)):
        pass


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("203.0.113.7", 9400, r"metrics\.address: cannot listen on 203\.0\.113\.7:9400 \(.+\); use 127\.0\.0\.1"),
        ("no-such-host.invalid", 9400, r"metrics\.address: cannot listen on no-such-host\.invalid:9400"),
    ],
)
def test_an_address_of_another_machine_is_refused(tmp_path: Path, address: str, port: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(address, port, node=0, run_dir=tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "endpoints").exists()


def test_no_free_port_is_one_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 65535))
            taken.listen()
        except OSError:
            pass  # taken by someone else: as good
        with pytest.raises(ValueError, match=r"metrics\.port: 65535 to 65535 are all in use on 127\.0\.0\.1"):
            Endpoint("127.0.0.1", 65535, node=0, run_dir=tmp_path)


# peaks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307.4),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


# log


@pytest.mark.usefixtures("clean_log")
def test_rank_0_says_all_and_others_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup(0, tmp_path / "run")
    log.debug("hidden")
    log.info("resumed at step %d", 40)
    logs.progress.info("step 50")
    setup(3, tmp_path / "run", node=1)
    log.info("hidden")
    log.warning("skipped damaged\nsample")
    assert capsys.readouterr().err == (
        "resumed at step 40\nstep 50\n[node 1 rank 3] warning: skipped damaged\nsample\n"
    )
    events = (tmp_path / "run" / "events.log").read_text().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert re.fullmatch(rf"{time} rank 0 info resumed at step 40", events[0])
    assert re.fullmatch(rf"{time} rank 3 warning skipped damaged\\nsample", events[1])
    assert len(events) == 2


def test_events_of_several_processes_do_not_interleave(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lte_scale.log import log, setup; rank = int(sys.argv[1]); "
        "setup(rank, Path(sys.argv[2])); [log.warning('x' * 2000) for _ in range(200)]"
    )
    command = [sys.executable, "-c", program]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)], stderr=subprocess.DEVNULL) for r in range(3)]
    assert [process.wait(20) for process in ranks] == [0, 0, 0]
    events = (tmp_path / "events.log").read_text().splitlines()
    assert len(events) == 600
    assert all(re.fullmatch(r"\S+ rank [012] warning x{2000}", event) for event in events)


@pytest.mark.usefixtures("clean_log")
def test_an_unwritable_run_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: cannot write .*events\.log \(.+\); choose a directory") as caught:
        setup(0, tmp_path / "file")
    assert "\n" not in str(caught.value)
