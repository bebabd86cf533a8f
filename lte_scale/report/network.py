"""The bytes that left a node: against full-rank DDP, and by what they were for."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial

from lte_scale.report.curves import palette
from lte_scale.report.runs import Run
from lte_scale.report.style import GREY
from lte_scale.report.tables import Row, bar, section, table
from lte_scale.report.words import ratio, size, times

PURPOSES = {
    "base": "base weights",
    "head_gradient": "gradients inside heads",
    "merge_factor": "merges: factors",
    "merge_dense": "merges: dense changes",
    "merge_replica": "merges: replica parameters",
    "merge_region": "merges inside regions",
    "merge_refresh": "merges: refreshed weights",
}
SCOPES = {"inter_node": "Between nodes", "intra_node": "Inside a node"}


def per_image(run: Run, key: str) -> float:
    return ratio(run.last(key), run.last("images"))


def fewer(run: Run) -> str:
    """How many times fewer bytes leave a node than by full-rank DDP, in words; empty where nothing tells."""
    sent, full = run.last("inter_node_bytes"), run.last("full_rank_bytes")
    if not (math.isfinite(sent) and math.isfinite(full)) or full <= 0:
        return ""
    if sent == 0:
        return "nothing at all, unlike full-rank DDP"
    if sent <= full:
        return f"{times(full / sent)} times fewer than full-rank DDP"
    return f"{times(sent / full)} times more than full-rank DDP"


def bytes_sent(runs: Sequence[Run]) -> str:
    """The section on bytes: against full-rank DDP on a log scale, then by purpose; empty where nothing was sent."""
    bars = _against_full_rank(runs)
    body = ""
    for scope, title in SCOPES.items():
        keys = sorted({key for run in runs for key in run.parts("sent_bytes") if key.startswith(f"{scope}/")})
        rows = [Row(_purpose(key), partial(_sent, key), size) for key in keys]
        body += section(title, rows, runs)
    return bars + (table(runs, body) if body else "")


def _purpose(key: str) -> str:
    name = key.partition("/")[2]
    return html.escape(PURPOSES.get(name, name.replace("_", " ")))


def _sent(key: str, run: Run) -> float | None:
    return run.last(f"sent_bytes.{key}") or None


def _against_full_rank(runs: Sequence[Run]) -> str:
    shown: list[tuple[str, str, float, str]] = []
    alternatives: dict[float, list[str]] = {}
    for run, colour, _ in palette(runs):
        full = per_image(run, "full_rank_bytes")
        sent = per_image(run, "inter_node_bytes")
        if full > 0 and math.isfinite(sent):
            shown.append((run.label, colour, sent, fewer(run)))
            alternatives.setdefault(float(f"{full:.3g}"), []).append(run.label)
    for full, labels in alternatives.items():
        of = "" if len(alternatives) == 1 else " of " + ", ".join(labels)
        shown.append((f"full-rank DDP{of}", GREY, full, "gradients of every weight, fp32, every step"))
    sizes = [value for _, _, value, _ in shown if value > 0]
    if not sizes:
        return ""
    low, high = math.floor(math.log10(min(sizes)) - 0.3), math.ceil(math.log10(max(sizes)))
    bars = ""
    for label, colour, value, note in shown:
        width = 100 * (math.log10(value) - low) / (high - low) if value > 0 else 0
        fill = f'<span style="width:{width:.2f}%;background:{colour}"></span>'
        track = f'<span class="track log" style="--decade:{100 / (high - low):.3f}%">{fill}</span>'
        bars += bar(label, track, f"<b>{size(value)}</b> {html.escape(note)}")
    return (
        f'<p class="note">Sent by one node to others per image of the run. Each line is ten times the one before it.'
        f'</p><div class="bars">{bars}</div>'
    )
