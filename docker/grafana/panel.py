"""Panels of a Grafana dashboard as its JSON has them, one function per kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SOURCE = {"type": "prometheus", "uid": "prometheus"}
SELECTION = 'job="$job", node=~"$node"'

Panel = dict[str, Any]
Queries = Sequence[tuple[str, str]]
"""(PromQL, legend) each."""


def written(query: str) -> str:
    """A query as Grafana gets it: `{` selects the run and its nodes, `[]` is the window that rates are taken over.

    `rate(lte_images_total{}[])` is written as `rate(lte_images_total{job="$job", node=~"$node"}[$__rate_interval])`.
    One that names $job is left as it is.
    """
    if "$job" not in query:
        query = re.sub(r"\{(\}?)", lambda found: f"{{{SELECTION}{found[1] or ', '}", query)
    return query.replace("[]", "[$__rate_interval]")


def _panel(kind: str, title: str, description: str, targets: list[dict[str, Any]], size: tuple[int, int]) -> Panel:
    for ref, target in zip("ABCDEFGHIJKL", targets, strict=False):
        target["refId"] = ref
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {},
        "targets": targets,
    }


def _target(query: str, legend: str = "", *, instant: bool = False, form: str = "time_series") -> dict[str, Any]:
    return {
        "datasource": SOURCE,
        "expr": written(query),
        "legendFormat": legend,
        "instant": instant,
        "range": not instant,
        "format": form,
    }


def _thresholds(*colours: tuple[str, float | None]) -> dict[str, Any]:
    """Colours from these values on; the first is that of all below."""
    return {"mode": "absolute", "steps": [{"color": colour, "value": value} for colour, value in colours]}


def stat(
    title: str,
    description: str,
    query: str,
    unit: str,
    *,
    orange: float | None = None,
    red: float | None = None,
    decimals: int | None = None,
    width: int = 4,
) -> Panel:
    """One number, coloured from `orange` and `red` on, where they are given."""
    panel = _panel("stat", title, description, [_target(query)], (width, 4))
    defaults = panel["fieldConfig"]["defaults"]
    defaults |= {"unit": unit, "noValue": "-"}
    if orange is None:
        defaults["color"] = {"mode": "fixed", "fixedColor": "text"}
    else:
        defaults["thresholds"] = _thresholds(("green", None), ("orange", orange), ("red", red))
    if decimals is not None:
        defaults["decimals"] = decimals
    panel["options"] = {
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel


def series(
    title: str,
    description: str,
    queries: Queries,
    unit: str = "none",
    *,
    dashed: Sequence[str] = (),
    stacked: bool = False,
    log: bool = False,
    limit: float | None = None,
    least: float | None = 0,
    width: int = 8,
) -> Panel:
    """Lines over time. dashed: legends of references; stacked: areas; limit: a line that an alert is about."""
    panel = _panel("timeseries", title, description, [_target(*query) for query in queries], (width, 8))
    custom: dict[str, Any] = {
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 0,
        "showPoints": "auto",
        "spanNulls": 120_000,  # milliseconds without a value that a line crosses
    }
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    if log:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    defaults: dict[str, Any] = {"unit": unit, "custom": custom}
    if limit is not None:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = _thresholds(("transparent", None), ("red", limit))
    if least is not None and not log:
        defaults["min"] = least
    style = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [10, 10]}}
    colour = {"id": "color", "value": {"mode": "fixed", "fixedColor": "gray"}}
    overrides = [{"matcher": {"id": "byName", "options": name}, "properties": [style, colour]} for name in dashed]
    panel["fieldConfig"] = {"defaults": defaults, "overrides": overrides}
    panel["options"] = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def bars(title: str, description: str, queries: Queries, unit: str, *, width: int = 8) -> Panel:
    """Numbers of now, side by side."""
    targets = [_target(*query, instant=True) for query in queries]
    panel = _panel("bargauge", title, description, targets, (width, 8))
    panel["fieldConfig"]["defaults"] |= {"unit": unit, "min": 0, "color": {"mode": "fixed", "fixedColor": "blue"}}
    panel["options"] = {
        "orientation": "horizontal",
        "displayMode": "basic",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel


def heatmap(title: str, description: str, query: str, unit: str, *, width: int = 8) -> Panel:
    """A histogram over time, from its buckets."""
    panel = _panel("heatmap", title, description, [_target(query, "{{le}}", form="heatmap")], (width, 8))
    panel["options"] = {
        "calculate": False,
        "yAxis": {"unit": unit},
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
        "cellGap": 1,
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    }
    return panel


def timeline(title: str, description: str, query: tuple[str, str], states: Mapping[str, tuple[str, str]]) -> Panel:
    """A bar per series that changes colour with its value. states: text and colour by value."""
    panel = _panel("state-timeline", title, description, [_target(*query)], (8, 8))
    options = {value: {"text": text, "color": colour} for value, (text, colour) in states.items()}
    panel["fieldConfig"]["defaults"] |= {
        "mappings": [{"type": "value", "options": options}],
        "custom": {"fillOpacity": 70},
    }
    panel["options"] = {
        "showValue": "never",
        "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"},
    }
    return panel


def table(
    title: str,
    description: str,
    columns: Sequence[tuple[str, str, str]],
    *,
    hidden: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    size: tuple[int, int] = (12, 7),
) -> Panel:
    """A row per set of labels; columns: (name, query, unit) each. A column without a name is not shown."""
    targets = [_target(query, instant=True, form="table") for _, query, _ in columns]
    panel = _panel("table", title, description, targets, size)
    names = {f"Value #{target['refId']}": name for target, (name, _, _) in zip(targets, columns, strict=True)}
    gone = ["Time", *hidden, *(column for column, name in names.items() if not name)]
    shown = {column: name for column, name in names.items() if name}
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": dict.fromkeys(gone, True), "renameByName": {**shown, **(renamed or {})},
        }},
    ]  # fmt: skip
    panel["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, _, unit in columns
        if name
    ]
    panel["fieldConfig"]["defaults"] = {"noValue": "none"}
    return panel
