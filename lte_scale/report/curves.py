"""What the panels of a report show: series over optimizer steps, drawn by `svg` for the page, by `picture` as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from lte_scale.report.runs import Run
from lte_scale.report.style import COLOURS
from lte_scale.report.words import round_size

POINTS = 600
HEADS_TOLD_APART = len(COLOURS)


Look = Literal["line", "faint", "dotted", "marks", "band", "area"]


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps. Of a `band` and an `area`, which is filled, `low` is the lower edge."""

    steps: np.ndarray
    values: np.ndarray
    look: Look = "line"
    low: np.ndarray | None = None
    colour: str = ""
    dash: int = 0


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot. `zero` has the axis begin there; `restarts` are steps."""

    title: str
    subtitle: str
    series: Sequence[Series]
    last_step: float
    show: Callable[[float], str]
    zero: bool = False
    restarts: Sequence[float] = ()

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value to show, with a margin."""
        low = min(float(np.min(s.values if s.low is None else s.low)) for s in self.series)
        high = max(float(np.max(s.values)) for s in self.series)
        if self.zero and low >= 0:
            return 0.0, 1.05 * high or 1.0
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        return low - margin, high + margin

    def ticks(self) -> list[float]:
        """Round numbers in that range."""
        low, high = self.range()
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in ticks if low <= tick <= high]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def step_ticks(last: float) -> list[float]:
    """Round steps from 0 to `last`."""
    return [float(t) for t in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, last) if t <= last]


def show_step(step: float) -> str:
    return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k" if step >= 1e5 else f"{step:,.0f}"


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the values, leaving out NaN."""
    half = len(values) // 60
    finite = np.isfinite(values)
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    within = number[end] - number[first]
    return np.where(within > 0, (total[end] - total[first]) / np.maximum(within, 1), np.nan)


def thinned(values: np.ndarray) -> np.ndarray:
    """Indices of all values; of many, of the lowest and the highest of each stretch."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for first, end in pairwise(np.linspace(0, len(values), POINTS // 2 + 1).astype(int)):
        kept |= {first + int(values[first:end].argmin()), first + int(values[first:end].argmax())}
    return np.array(sorted(kept))


def _series(run: Run, values: np.ndarray, look: Look = "line", *, smoothly: bool = False, colour: str = "") -> Series:
    known = np.flatnonzero(np.isfinite(values))
    drawn = smooth(values[known]) if smoothly else values[known]
    shown = thinned(drawn)
    return Series(run.steps[known][shown], drawn[shown], look, colour=colour)


Plot = Callable[[Run], Iterator[Series]]


def smoothed(key: str) -> Plot:
    def plot(run: Run) -> Iterator[Series]:
        yield _series(run, run.column(key), "faint")
        yield _series(run, run.column(key), smoothly=True)

    return plot


def plain(key: str) -> Plot:
    def plot(run: Run) -> Iterator[Series]:
        yield _series(run, run.column(key))

    return plot


def loss(run: Run) -> Iterator[Series]:
    yield from smoothed("loss")(run)
    yield _series(run, run.column("eval_loss"), "marks")


def accuracy(run: Run) -> Iterator[Series]:
    yield _series(run, 100 * run.column("top1"), smoothly=True)
    yield _series(run, 100 * run.column("eval_top1"), "marks")


def cosine(run: Run) -> Iterator[Series]:
    yield _series(run, run.column("head_cosine_mean"))
    yield _series(run, run.column("head_cosine_max"), "dotted")


def rank_share(run: Run) -> Iterator[Series]:
    yield _series(run, 100 * run.column("delta_rank_ratio"))


def heads(key: str) -> Plot:
    """The band from the lowest to the highest head, and their mean."""

    def plot(run: Run) -> Iterator[Series]:
        columns = np.array(list(run.parts(key).values()))
        known = np.flatnonzero(np.isfinite(columns).all(axis=0)) if len(columns) else np.array([], int)
        if not len(known):
            return
        low, mean, high = (smooth(reduce(columns[:, known], axis=0)) for reduce in (np.min, np.mean, np.max))
        shown = np.linspace(0, len(known) - 1, min(len(known), POINTS // 2)).astype(int)
        steps = run.steps[known][shown]
        yield Series(steps, high[shown], "band", low[shown])
        yield Series(steps, mean[shown])

    return plot


def each_head(run: Run, key: str) -> Iterator[Series]:
    """A line for every head, in a colour of its own."""
    for column, colour in zip(run.parts(key).values(), COLOURS, strict=False):
        yield _series(run, column, smoothly=True, colour=colour)


@dataclass(frozen=True, slots=True)
class Sketch:
    """A panel before its runs are known. `heads` names the column that has a line per head where one run is shown."""

    title: str
    subtitle: str
    plot: Plot
    show: Callable[[float], str] = number
    zero: bool = False
    heads: str = ""


CURVES = (
    Sketch("Loss", "training (line), held-out (circles)", loss),
    Sketch("Top-1 accuracy, %", "training (line), held-out (circles)", accuracy),
    Sketch("Throughput, images per second", "of the whole run", smoothed("images_per_second"), zero=True),
    Sketch("Bytes between nodes", "sent by one node, cumulative", plain("inter_node_bytes"), round_size, zero=True),
    Sketch("Learning rate", "of the factors", plain("lr"), zero=True),
    Sketch("Gradient norm", "before clipping, mean over heads", smoothed("grad_norm"), zero=True),
)
MEMORY = Sketch("Memory peak", "of the fullest rank of node 0", plain("memory_peak_bytes"), round_size, zero=True)
HEADS = (
    Sketch("Loss of the heads", "", heads("head_loss"), heads="head_loss"),
    Sketch("Gradient norm of the heads", "", heads("head_grad_norm"), zero=True, heads="head_grad_norm"),
    Sketch("Size of what a head learned", "", heads("head_delta_norm"), zero=True, heads="head_delta_norm"),
    Sketch("Cosine between heads", "between what two heads learned: mean (line), largest (dots)", cosine),
    Sketch("Effective rank of a merge", "of the merged delta, mean over sampled layers", plain("delta_effective_rank"),
           zero=True),
    Sketch("Effective rank, % of the most", "of the highest rank these heads could reach", rank_share, zero=True),
)  # fmt: skip


def palette(runs: Sequence[Run]) -> list[tuple[Run, str, int]]:
    """Every run with its colour and its dash, the same in all panels."""
    return [(run, COLOURS[i % len(COLOURS)], i // len(COLOURS)) for i, run in enumerate(runs)]


def told_apart(runs: Sequence[Run]) -> int:
    """Heads that have lines of their own: those of a single run, where they are few."""
    number = len(runs[0].parts("head_loss"))
    return number if len(runs) == 1 and 1 < number <= HEADS_TOLD_APART else 0


def panels(sketches: Sequence[Sketch], runs: Sequence[Run]) -> list[Panel]:
    """The panels for which there are data."""
    last = float(max(run.step for run in runs))
    restarts = [event.step for event in runs[0].events if event.kind == "restart" and event.step is not None]
    made = []
    for sketch in sketches:
        apart = bool(sketch.heads and told_apart(runs))
        drawn = [
            Series(s.steps, s.values, s.look, s.low, s.colour or colour, dash)
            for run, colour, dash in palette(runs)
            for s in (each_head(run, sketch.heads) if apart else sketch.plot(run))
            if len(s.steps)
        ]
        subtitle = sketch.subtitle or ("one line each" if apart else "lowest to highest (band), mean (line)")
        if drawn:
            shown = [step for step in restarts if step <= last] if len(runs) == 1 else []
            made.append(Panel(sketch.title, subtitle, drawn, max(last, 1), sketch.show, sketch.zero, shown))
    return made
