#!/usr/bin/env python3
"""Write dashboards/lte.json from the panels of learning.py, speed.py and health.py: `make dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from health import DATA, FAULTS, NODES
from learning import HEADS, LEARNING, OVERVIEW
from panel import SOURCE, Panel, written
from speed import NETWORK, STEP, THROUGHPUT

PATH = Path(__file__).parent / "dashboards" / "lte.json"
COLUMNS = 24
SECTIONS = {
    "Overview": OVERVIEW,
    "Learning": LEARNING,
    "Throughput and MFU": THROUGHPUT,
    "Step anatomy": STEP,
    "Network": NETWORK,
    "Heads": HEADS,
    "Data": DATA,
    "Faults": FAULTS,
    "Nodes": NODES,
}


def laid_out() -> list[Panel]:
    """The sections' panels after their rows' titles, from left to right in lines of 24 columns."""
    placed: list[Panel] = []
    y = 0
    for section, panels in SECTIONS.items():
        placed.append({"type": "row", "title": section, "collapsed": False, "panels": []})
        placed[-1]["gridPos"] = {"w": COLUMNS, "h": 1, "x": 0, "y": y}
        y, x, height = y + 1, 0, 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > COLUMNS:
                y, x, height = y + height, 0, 0
            placed.append({**panel, "gridPos": {**size, "x": x, "y": y}})
            x, height = x + size["w"], max(height, size["h"])
        y += height
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]


def variable(name: str, label: str, query: str, **more: Any) -> dict[str, Any]:
    asked = {"query": query, "refId": "StandardVariableQuery"}
    # 2: asked again when the range of time changes, since other runs are in another range
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "definition": query, "query": asked,
        "refresh": 2, "sort": 3, **more,
    }  # fmt: skip


def annotation(name: str, colour: str, query: str) -> dict[str, Any]:
    """A mark at the time that the query's value tells, in milliseconds."""
    return {
        "name": name, "datasource": SOURCE, "enable": True, "iconColor": colour, "expr": written(query),
        "step": "15s", "titleFormat": name.removesuffix("s"), "useValueForTime": True,
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    return {
        "uid": "lte-scale",
        "title": "lte-scale",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "tags": ["lte-scale"],
        "graphTooltip": 1,  # one crosshair over all panels
        "templating": {
            "list": [
                variable("job", "run", "label_values(lte_step, job)"),
                variable(
                    "node", "node", 'label_values(lte_step{job="$job"}, node)',
                    multi=True, includeAll=True, allValue=".*", current={"text": ["All"], "value": ["$__all"]},
                ),
            ]
        },
        "annotations": {
            "list": [
                annotation("Starts", "orange", "max(lte_start_timestamp_seconds{}) * 1000"),
                annotation("Checkpoints", "green", "max(lte_checkpoint_timestamp_seconds{}) * 1000"),
            ]
        },
        "panels": laid_out(),
    }  # fmt: skip


def text() -> str:
    """The dashboard as JSON, a line per panel."""
    board = dashboard()
    panels = ",\n".join(json.dumps(panel) for panel in board.pop("panels"))
    return f'{json.dumps(board, indent=2)[:-2]},\n  "panels": [\n{panels}\n]}}\n'


if __name__ == "__main__":
    PATH.write_text(text())
