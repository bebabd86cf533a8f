"""A run of two nodes as a real Prometheus and a real browser see it, and one that hangs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import free_port
from tests.test_dashboards import ALERTS, PROMETHEUS, RECORDED, queries

ROOT = Path(__file__).parent.parent
EMULATE = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", "2", "--ranks-per-node", "2", "--"]
STEPS, EVERY = 600, 10
NO_DATA_ON_A_CPU = {"Power", "Temperature"}
NO_DATA_IN_A_SOUND_RUN = {"Alerts that fire"}
pytestmark = [
    pytest.mark.observability,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus"),
]


class Prometheus:
    """A Prometheus server with the project's configuration, on one run, scraping every second. A context manager."""

    def __init__(self, run_dir: Path, folder: Path) -> None:
        shutil.copytree(PROMETHEUS, folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["file_sd_configs"] = [
            {"files": [str(run_dir / "endpoints" / "*.json")], "refresh_interval": "1s"}
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = yaml.safe_load((folder / "rules.yml").read_text())
        rules["groups"][0]["interval"] = "1s"
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))
        self.url = f"http://127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        self.process = subprocess.Popen(command)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str, **words: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        return json.load(urllib.request.urlopen(url, timeout=30))["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found


def words(digits: Path, run_dir: Path) -> list[str]:
    return [
        *["train", str(ROOT / "configs" / "demo.yaml"), f"run_dir={run_dir}", f"data.train={digits / 'train'}"],
        *[f"data.val={digits / 'val'}", f"train.duration={STEPS}", f"metrics.every={EVERY}"],
        *[f"metrics.port={free_port()}", "metrics.heads_every=20", "metrics.peak_tflops=0.1", "metrics.job=vit"],
        *["checkpoint.every=100", "evaluate.every=100"],
    ]


@pytest.fixture(scope="module")
def watched(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Prometheus answers when a run is nearly over, and what it has stored of it."""
    folder = tmp_path_factory.mktemp("watched")
    run_dir = folder / "run"
    with Prometheus(run_dir, folder / "prometheus") as prometheus:
        run = subprocess.Popen([*EMULATE, *words(digits, run_dir)], stderr=subprocess.PIPE, text=True)
        assert run.stderr is not None
        try:
            for line in run.stderr:
                if line.startswith("step") and int(line.split()[1].split("/")[0].replace(",", "")) >= STEPS - 100:
                    break
            seen: dict[str, Any] = {"run_dir": run_dir, "targets": prometheus.get("targets")["activeTargets"]}
            names = {"$__rate_interval": "1m", "$__range": "10m", "$job": "vit", "$node": "0|1"}
            seen["panels"] = {}
            for panel, query, _ in queries():
                for name, value in names.items():
                    query = query.replace(name, value)
                seen["panels"][panel, query] = prometheus.query(query)
            seen["recorded"] = {rule["record"]: prometheus.query(rule["record"]) for rule in RECORDED}
            seen["firing"] = prometheus.query('ALERTS{alertstate="firing"}')
            seen["alerts"] = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
            target = json.loads((run_dir / "endpoints" / "node0.json").read_text())[0]["targets"][0]
            seen["text"] = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
            seen["end"] = run.stderr.read()
            assert run.wait(60) == 0
            stored = prometheus.query('{job="vit", __name__=~"lte_.*"}[30m]')
            seen["stored"] = {
                (s["metric"].pop("__name__"), tuple(sorted(s["metric"].items()))): {t: float(v) for t, v in s["values"]}
                for s in stored
            }
            deadline = time.monotonic() + 20
            while prometheus.get("targets")["activeTargets"] and time.monotonic() < deadline:
                time.sleep(0.5)
            seen["targets after the end"] = prometheus.get("targets")["activeTargets"]
        finally:
            run.terminate()
            run.wait(60)
    return seen


def stored(seen: dict[str, Any], name: str, **labels: str) -> dict[float, float]:
    """Values by time of the one series with these labels among others."""
    wanted = set(labels.items())
    found = [values for (of, having), values in seen["stored"].items() if of == name and wanted <= set(having)]
    assert len(found) == 1, (name, labels, len(found))
    return found[0]


def test_every_node_is_found_and_up(watched: dict[str, Any]) -> None:
    found = {target["labels"]["node"]: target for target in watched["targets"]}
    assert set(found) == {"0", "1"}
    assert all(t["health"] == "up" and t["labels"]["job"] == "vit" for t in found.values()), found
    assert watched["targets after the end"] == []


def test_every_panel_and_recording_rule_has_data(watched: dict[str, Any]) -> None:
    empty = {
        panel for (panel, query), result in watched["panels"].items() if not result and "accelerator_" not in query
    }
    assert empty <= NO_DATA_ON_A_CPU | NO_DATA_IN_A_SOUND_RUN
    assert len(watched["panels"]) > 60
    assert not [name for name, result in watched["recorded"].items() if not result]
    nodes = {series["metric"]["node"] for series in watched["recorded"]["node:lte_images:rate5m"]}
    assert nodes == {"0", "1"}


def test_no_alert_fires_on_a_sound_run(watched: dict[str, Any]) -> None:
    assert watched["firing"] == []
    assert {rule["alert"] for rule in ALERTS} <= watched["alerts"]


def test_what_prometheus_stored_is_what_the_records_say(watched: dict[str, Any]) -> None:
    records = {r["step"]: r for r in map(json.loads, (watched["run_dir"] / "metrics.jsonl").read_text().splitlines())}
    steps = stored(watched, "lte_step", node="0")
    compared = agreed = 0
    series = {
        "lr": stored(watched, "lte_learning_rate", node="0"),
        "mfu": stored(watched, "lte_mfu_ratio", node="0"),
        "full_rank_bytes": stored(watched, "lte_full_rank_bytes_total", node="0"),
        "step": stored(watched, "lte_steps_total", node="0"),
    }
    heads = [stored(watched, "lte_loss", node="0", head=str(head)) for head in (0, 1)]
    sent: dict[float, float] = {}
    for (name, labels), values in watched["stored"].items():
        if name == "lte_network_bytes_total" and {("node", "0"), ("scope", "inter_node")} <= set(labels):
            sent = {moment: sent.get(moment, 0.0) + value for moment, value in values.items()}
    for moment, step in steps.items():
        if step not in records:
            continue
        record = records[int(step)]
        pairs = [(values.get(moment), record[key]) for key, values in series.items()]
        pairs += [(values.get(moment), loss) for values, loss in zip(heads, record["head_loss"], strict=True)]
        pairs.append((sent.get(moment), record["inter_node_bytes"]))
        compared += 1
        agreed += all(here is not None and here == pytest.approx(there, rel=1e-9) for here, there in pairs)
    assert compared >= 10
    assert agreed >= 0.8 * compared  # a scrape may fall between two of a record's values

    last = records[STEPS]
    by_node = [stored(watched, "lte_images_total", node=node) for node in ("0", "1")]
    at_most = max(max(values.values()) for values in by_node)
    assert last["images"] / 2 - 100 * 64 <= at_most <= last["images"] / 2
    shares = last["phase_seconds"]
    spent = sum(shares.values())
    assert shares["forward"] + shares["backward"] > 0.4 * spent
    assert spent == pytest.approx(sum(r["step_seconds"] * EVERY for r in records.values()), rel=0.25)


def test_promtool_finds_no_fault_with_the_exposition(watched: dict[str, Any]) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=watched["text"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_terminal_tells_the_run(watched: dict[str, Any]) -> None:
    assert re.search(r"^  network  .* sent by a node, .*; full-rank DDP sends \d+ times as much$", watched["end"], re.M)
    assert re.search(r"^  time in  .*forward \d+ %", watched["end"], re.M)


def test_top_shows_a_run_that_is_over_as_gone(watched: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lte_scale", "top", "--once", str(watched["run_dir"])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_hang_is_named_and_ended(digits: Path, tmp_path: Path) -> None:
    """A rank of node 1 is stopped in the middle; all ranks end, and the log names it."""
    seconds = 8
    run_dir = tmp_path / "run"
    command = [*EMULATE, *words(digits, run_dir), f"watchdog.seconds={seconds}", "train.duration=100000"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    victim = 0
    try:
        deadline = time.monotonic() + 120
        while not victim:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.5)
            metrics = run_dir / "metrics.jsonl"
            if metrics.exists() and metrics.read_text().count("\n") > 2:
                victim = process_of_rank(3, run_dir)
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        assert run.wait(120) != 0
        took = time.monotonic() - stopped
    finally:
        if victim:
            os.kill(victim, signal.SIGKILL) if Path(f"/proc/{victim}").exists() else None
        run.terminate()
        run.wait(60)
    (verdict,) = [line for line in (run_dir / "events.log").read_text().splitlines() if " error hang: " in line]
    assert "rank 3" in verdict and "node 1" in verdict, verdict
    assert took < 6 * seconds + 40
    assert {path.name.rpartition("_")[2] for path in (run_dir / "hangs").iterdir()} >= {"rank0.txt", "rank2.txt"}


def process_of_rank(rank: int, run_dir: Path) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode().split("\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run_dir={run_dir}" in command and f"RANK={rank}".encode() in environment:
            return int(path.name)
    return 0
