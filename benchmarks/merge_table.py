"""The tables of `benchmarks/merge.py`: medians over rounds, with the smallest and the largest where they differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""One run: `method`, `nodes`, `link_mbit` (None: no limit), `images_per_step`, and the figures it told."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "merge.md"
HEADINGS = (
    "nodes",
    "link",
    "method",
    "KB per image",
    "of DDP's",
    "images/s",
    "of DDP's",
    "of no limit",
    "in merges",
    "waiting",
)


def bytes_per_image(run: Run) -> float:
    """Bytes that a node sent to others, per image of the whole run; mean over the nodes."""
    return statistics.mean(run["bytes_by_node"]) / (run["steps"] * run["images_per_step"])


def images_per_second(run: Run) -> float:
    """Of all nodes together."""
    return float(run["steps"] * run["images_per_step"] / run["seconds"])


def share(runs: Sequence[Run], seconds: str) -> str:
    """So many seconds of a run over all of it, the median; a dash where no run tells them."""
    found = [run[seconds] / run["seconds"] for run in runs if run.get(seconds) is not None]
    return f"{100 * statistics.median(found):.2g} %" if found else "-"


class Rows:
    """The runs, by what they are compared by."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def of(self, method: str, nodes: int, link: float | None) -> list[Run]:
        return [r for r in self.runs if (r["method"], r["nodes"], r["link_mbit"]) == (method, nodes, link)]

    def median(self, figure: Callable[[Run], float], method: str, nodes: int, link: float | None) -> float | None:
        """Median of `figure` over the rounds, None without a run."""
        runs = self.of(method, nodes, link)
        return statistics.median(map(figure, runs)) if runs else None

    def row(self, method: str, nodes: int, link: float | None) -> str:
        runs, place = self.of(method, nodes, link), (nodes, link)
        speed, sent = self.median(images_per_second, method, *place), self.median(bytes_per_image, method, *place)
        cells = [
            str(nodes),
            link_name(link),
            f"`{method}`",
            spread([bytes_per_image(run) / 1e3 for run in runs]),
            ratio(sent, self.median(bytes_per_image, "ddp", *place)),
            spread([images_per_second(run) for run in runs]),
            ratio(speed, self.median(images_per_second, "ddp", *place)),
            ratio(speed, self.median(images_per_second, method, nodes, None)),
            share(runs, "merge_seconds"),
            share(runs, "wait_seconds"),
        ]
        return f"| {' | '.join(cells)} |"


def link_name(link: float | None) -> str:
    """A link of so many Mbit/s in words."""
    if link is None:
        return "no limit"
    return f"{link / 1000:g} Gbit/s" if link >= 1000 else f"{link:g} Mbit/s"


def spread(values: Sequence[float]) -> str:
    """Median (smallest - largest), the latter where they differ in print."""
    middle, least, most = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
    middle, least, most = (f"{float(text):g}" for text in (middle, least, most))
    return middle if least == most else f"{middle} ({least} - {most})"


def ratio(value: float | None, reference: float | None) -> str:
    """`value` over `reference`; a dash where either was not measured."""
    if value is None or not reference:
        return "-"
    return f"{float(f'{value / reference:.2g}'):g}"


def speed_table(runs: Sequence[Run]) -> str:
    """A row for each number of nodes, link and method that was run, in the order of the first round."""
    rows = Rows(runs)
    places = sorted({(r["nodes"], r["link_mbit"] or float("inf")) for r in runs})
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for nodes, link in places:
        for method in dict.fromkeys(r["method"] for r in runs):
            limit = None if link == float("inf") else link
            if rows.of(method, nodes, limit):
                lines.append(rows.row(method, nodes, limit))
    return "\n".join(lines)


def accuracy_table(runs: Sequence[Run]) -> str:
    """Held-out top-1 of every method after the same number of samples, over seeds."""
    lines = ["| method | top-1, % | seeds |", "|---|---|---|"]
    for method in dict.fromkeys(r["method"] for r in runs):
        top1 = [100 * r["eval_top1"] for r in runs if r["method"] == method]
        lines.append(f"| `{method}` | {spread(top1)} | {len(top1)} |")
    return "\n".join(lines)
