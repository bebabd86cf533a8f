"""docs/quality.md and its picture, from the runs of `benchmarks/quality.py`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from figures import write_between_marks

Run = dict[str, Any]
FULL = "full"


@dataclass(frozen=True)
class Series:
    """The runs of a row at its best learning rate, one per seed."""

    rate: float
    tried: int
    runs: Sequence[Run]

    @property
    def finals(self) -> list[float]:
        return [run["curve"][-1]["top1"] for run in self.runs]

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(images, top-1), the mean over seeds."""
        points: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            for point in run["curve"]:
                points[point["images"]].append(point["top1"])
        return [(images, statistics.mean(found)) for images, found in sorted(points.items())]

    def images_to(self, top1: float) -> float | None:
        """Where the curve first reaches an accuracy, between its points on a line."""
        before = (0, 0.0)
        for images, reached in self.curve:
            if reached >= top1:
                share = (top1 - before[1]) / (reached - before[1]) if reached > before[1] else 0.0
                return before[0] + share * (images - before[0])
            before = (images, reached)
        return None


def series_of(runs: Sequence[Run], row: str) -> Series | None:
    """Of the runs of a row, those at the rate that was best on seed 0."""
    tuning = {run["rate"]: run["curve"][-1]["top1"] for run in runs if run["row"] == row and run["seed"] == 0}
    if not tuning:
        return None
    rate = max(tuning, key=tuning.__getitem__)
    return Series(rate, len(tuning), [run for run in runs if run["row"] == row and run["rate"] == rate])


def table(found: dict[str, Series]) -> str:
    full = found.get(FULL)
    lines = [
        "| row | learning rate (of so many tried) | seeds | top-1 | lowest to highest | images to full's top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row, series in found.items():
        finals, ratio = series.finals, "unknown"
        if full is not None:
            needed, whole = series.images_to(statistics.mean(full.finals)), full.curve[-1][0]
            ratio = f"{needed / whole:.2f} of full's" if needed is not None else "not reached"
        spread = f"{min(finals):.1%} to {max(finals):.1%}" if len(finals) > 1 else "one seed"
        mean = f"{statistics.mean(finals):.1%}"
        lines.append(f"| {row} | {series.rate:g} ({series.tried}) | {len(finals)} | {mean} | {spread} | {ratio} |")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, Series]) -> None:
    """Accuracy over images, rows with several seeds alone."""
    with plt.rc_context({"svg.hashsalt": "quality", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for row, series in found.items():
            if len(series.runs) < 2:
                continue
            images, top1 = zip(*series.curve, strict=True)
            (line,) = axes.plot(images, [100 * value for value in top1], marker=".", label=row)
            for run in series.runs:
                points = [(p["images"], 100 * p["top1"]) for p in run["curve"]]
                axes.plot(*zip(*points, strict=True), color=line.get_color(), linewidth=0.5, alpha=0.4)
        axes.set(xlabel="images", ylabel="held-out top-1, %")
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def write_page(page: Path, runs: Sequence[Run], rows: Sequence[str]) -> None:
    """A table of every duration and precision that was run, the picture of those with most runs."""
    if not runs:
        return
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["duration"], run["precision"]].append(run)
    parts = []
    for number, ((duration, precision), alike) in enumerate(sorted(groups.items(), key=lambda group: -len(group[1]))):
        found = {row: series for row in rows if (series := series_of(alike, row)) is not None}
        if number == 0:
            draw(page.with_suffix(".svg"), found)
        last = alike[-1]
        images = max(point["images"] for run in alike for point in run["curve"])
        parts.append(
            f"`train.duration={duration}`, {images:,} images, {precision}. {last['hardware']}, {last['threads']} "
            f"thread(s), torch {last['torch']}, {last['date']}, {len(alike)} runs.\n\n{table(found)}"
        )
    write_between_marks(page, "quality", "\n\n".join(parts))
