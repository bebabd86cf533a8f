"""Dashboard, recording rules and alerts: that they ask for what a run exports, in PromQL, and fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte_scale.config.schema import Config
from lte_scale.metrics.catalogue import LABELS, METRICS, PHASES, STEP_PHASES

ROOT = Path(__file__).parent.parent
GRAFANA, PROMETHEUS = ROOT / "docker" / "grafana", ROOT / "docker" / "prometheus"
BOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "lte.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ROWS = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
LEVELS = {"job": {"job"}, "node": {"job", "node"}, "rank": {"job", "node", "local_rank"}}
"""Labels of a recorded series, by the level that its name begins with."""

SUBSTITUTES = {"$__rate_interval": "1m", "$__range": "1h", "$job": "demo", "$node": "0|1"}
NAME = re.compile(r"(?:(?:job|node|rank):)?\blte_\w+(?::\w+)?")
SAMPLES = {
    "scope": ("inter_node", "intra_node", "local", "global"), "phase": tuple(PHASES),
    "path": ("factor", "dense", "replica"), "purpose": ("base", "merge_factor"), "result": ("written", "failed"),
    "kind": ("allocated", "reserved", "peak"),
    "head": ("0", "1"), "local_rank": ("0", "1"),
}  # fmt: skip
"""Values of the labels in an imagined run."""


def of_rules(name: str) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


RECORDED, ALERTS = of_rules("rules.yml"), of_rules("alerts.yml")


def promtool(*words: str | Path) -> None:
    """Run promtool, if it is there, and expect it to succeed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def series() -> dict[str, set[str]]:
    """Labels by name of all that Prometheus can have of a run."""
    found = {"up": {"job", "node", "instance"}, "ALERTS": {"job", "node", "alertname", "alertstate"}}
    for name, metric in METRICS.items():
        labels = {"job", "instance", "node", *metric.labels}
        if metric.kind == "histogram":
            found |= {f"{name}_sum": labels, f"{name}_count": labels, f"{name}_bucket": {*labels, "le"}}
        else:
            found[name] = labels
    return found | {rule["record"]: LEVELS[rule["record"].split(":")[0]] for rule in RECORDED}


def substituted(query: str) -> str:
    for name, value in SUBSTITUTES.items():
        query = query.replace(name, value)
    return query


def queries() -> list[tuple[str, str, str]]:
    """(panel, query, legend) of all panels, with Grafana's variables as they are."""
    return [(panel["title"], t["expr"], t["legendFormat"]) for panel in PANELS for t in panel["targets"]]


def asked() -> Iterator[str]:
    """Every query of panels, annotations and rules."""
    yield from (query for _, query, _ in queries())
    yield from (annotation["expr"] for annotation in BOARD["annotations"]["list"])
    yield from (rule["expr"] for rule in [*RECORDED, *ALERTS])


def test_prometheus_finds_the_nodes() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    trainer, mounts = services["trainer"], services["prometheus"]["volumes"]
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    assert {"./prometheus:/etc/prometheus:ro", "runs:/runs:ro"} <= set(mounts)
    assert "runs:/workspace/runs" in trainer["volumes"] and trainer["hostname"] == "trainer"
    assert "configs/demo.yaml" in trainer["command"][-1] and "metrics.address=0.0.0.0" in trainer["command"][-1]
    (job,) = config["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["files"] == [f"/{demo['run_dir']}/endpoints/*.json"]
    # The number of the node in the file's name becomes a label of `up`; the node itself tells the same.
    (relabel,) = job["relabel_configs"]
    for file in ("/runs/demo/endpoints/node12.json", "/runs/targets/node-run-2-node12.json"):
        match = re.fullmatch(relabel["regex"], file)
        assert match and match[1] == "12" and relabel["target_label"] == "node" and job["honor_labels"]
    assert config["rule_files"] == ["rules.yml", "alerts.yml"]
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_grafana_is_provisioned() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "lte.yaml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["grafana"]
    folder = provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert f"{folder}/lte.json" == grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    targets = [target for panel in PANELS for target in panel["targets"]]
    asking = [*PANELS, *targets, *BOARD["templating"]["list"], *BOARD["annotations"]["list"]]
    assert {each["datasource"]["uid"] for each in asking} == {source["uid"]}


def test_dashboard_is_as_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(GRAFANA), *sys.path])
    build = import_module("build")
    assert (GRAFANA / "dashboards" / "lte.json").read_text() == build.text(), "make dashboards"


def test_dashboard_is_in_order() -> None:
    titles = Counter(panel["title"] for panel in BOARD["panels"])
    assert set(titles.values()) == {1}, titles.most_common(3)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert not [panel["title"] for panel in PANELS if "Good" not in panel["description"]]
    assert {
        "Overview",
        "Learning",
        "Throughput and MFU",
        "Step anatomy",
        "Network",
        "Heads",
        "Data",
        "Faults",
        "Nodes",
    } == {row["title"] for row in ROWS}
    places = Counter(
        (x, y)
        for panel in BOARD["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    )
    assert set(places.values()) == {1} and max(x for x, _ in places) == 23


def test_full_rank_reference_is_dashed() -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == "Bytes between nodes")
    (legend,) = (t["legendFormat"] for t in panel["targets"] if "lte_full_rank_bytes_total" in t["expr"])
    (override,) = panel["fieldConfig"]["overrides"]
    assert override["matcher"] == {"id": "byName", "options": legend}
    assert any(p["id"] == "custom.lineStyle" and p["value"]["fill"] == "dash" for p in override["properties"])


@pytest.mark.parametrize("query", sorted(set(asked())))
def test_asks_for_what_there_is(query: str) -> None:
    known = series()
    names = set(NAME.findall(query)) | {name for name in ("up", "ALERTS") if re.search(rf"\b{name}{{", query)}
    assert names and names <= set(known), names - set(known)
    for name, matchers in re.findall(r"([\w:]*){([^}]*)}", query):
        labels = set(re.findall(r"(\w+)(?:=~|!=|=)", matchers)) - {"__name__"}
        assert labels <= (known[name] if name else {"job", "node"}), name
        for phases in re.findall(r'phase=~?"([^"]+)"', matchers):
            assert set(phases.split("|")) <= set(PHASES)
    grouped = re.findall(r"\b(?:by|on|ignoring|group_left) \(([^)]*)\)", query)
    labels = {label.strip() for group in grouped for label in group.split(",") if label}
    assert labels <= set().union(*(known[name] for name in names)), labels


def test_every_panel_shows_one_run() -> None:
    for panel, query, legend in queries():
        selected = re.findall(r"([\w:]*){([^}]*)}", query)
        assert selected and len(selected) >= len(re.findall(NAME, re.sub(r'"[^"]*"', "", query))), f"{panel}: {query}"
        for name, matchers in selected:
            assert 'job="$job"' in matchers and 'node=~"$node' in matchers, f"{panel}: {name}"
        shown = set(re.findall(r"{{(\w+)}}", legend))
        assert shown <= {*LABELS, "le"}, panel


def test_every_metric_is_shown() -> None:
    """What nobody can see at night need not be exported; what is here otherwise has a reason."""
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for query in asked() for name in NAME.findall(query)}
    assert set(METRICS) - seen <= {"lte_steps_total", "lte_windows_total"}
    assert {rule["record"] for rule in RECORDED} <= seen


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_rules_are_rules(name: str) -> None:
    promtool("check", "rules", PROMETHEUS / name)


def test_recorded_names_tell_their_labels() -> None:
    for rule in RECORDED:
        assert re.fullmatch(r"(job|node|rank):lte_[a-z_]+:[a-z0-9_]+", rule["record"])


def imagined() -> list[dict[str, str]]:
    """Samples of all metrics over ten minutes, of a run with two nodes."""
    written: dict[str, str] = {}
    for name, labels in series().items():
        if ":" in name:
            continue
        values = "0+1x40" if re.search(r"_(total|sum|count|bucket)$", name) else "1+0x40"
        rows: list[dict[str, str]] = [
            {"job": "demo", "instance": f"host{node}:9464", "node": str(node)} for node in (0, 1)
        ]
        for label in sorted(labels - {"job", "node", "instance"}):
            each = {"le": ("0.1", "+Inf"), "alertstate": ("firing",)}.get(label) or SAMPLES.get(label, ("x",))
            if name.startswith("lte_step_phase_seconds") and label == "phase":
                each = STEP_PHASES
            rows = [{**row, label: value} for row in rows for value in each]
        if name == "up":
            rows, values = rows + [{**rows[0], "instance": "gone:9464"}], "1+0x40"
        for row in rows:
            pairs = ", ".join(f'{label}="{value}"' for label, value in row.items())
            written[f"{name}{{{pairs}}}"] = values
    return [{"series": key, "values": values} for key, values in written.items()]


def test_every_panel_shows_something(tmp_path: Path) -> None:
    """promtool evaluates each query over a run that has every metric: joins match, nothing is filtered away."""
    shown = [substituted(query) for _, query, _ in queries()] + [rule["record"] for rule in RECORDED]
    samples = [{"labels": "{}", "value": 1}]
    cases = [{"expr": f"count({query}) > bool 0", "eval_time": "8m", "exp_samples": samples} for query in shown]
    test = {"interval": "15s", "input_series": imagined(), "promql_expr_test": cases}
    path = tmp_path / "panels.yml"
    whole = {"rule_files": [str(PROMETHEUS / "rules.yml")], "evaluation_interval": "15s", "tests": [test]}
    path.write_text(yaml.safe_dump(whole))
    promtool("test", "rules", path)


@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_is_tried_both_ways() -> None:
    fired: set[str] = set()
    silent: set[str] = set()
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fired if case["exp_alerts"] else silent).add(case["alertname"])
    assert fired == silent == {rule["alert"] for rule in ALERTS}


def test_every_alert_has_a_page() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["for"]
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        page, anchor = rule["annotations"]["runbook_url"].split("#")
        assert page == "docs/runbook.md" and anchor in anchors and anchor == rule["alert"].lower()


def test_runbook_names_what_there_is() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    sections = {field.name: field.default_factory for field in fields(Config) if callable(field.default_factory)}
    quoted = re.findall(r"`([a-z_]+)\.([a-z_]+)(?::[^`]*)?`", text)
    of_config = [(section, key) for section, key in quoted if section in sections]
    assert len(of_config) > 10 and not [pair for pair in of_config if not hasattr(sections[pair[0]](), pair[1])]
    titles = {panel["title"] for panel in BOARD["panels"]}
    named = set(re.findall(r"\*([^*\n]+)\*", re.sub(r"`[^`]*`|\*\*", "", text)))
    assert len(named) > 15 and not named - titles - {"like this"}
