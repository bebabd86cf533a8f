"""`lte-scale report`: curves and a comparison of runs, as a picture and as one self-contained HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

# Okabe and Ito's colours, told apart with any colour vision; from the seventh run on, another dash.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
THEMES = {
    "light": {"ink": "#22272e", "soft": "#6b7480", "grid": "#e6e9ed", "paper": "#ffffff"},
    "dark": {"ink": "#e3e7ec", "soft": "#96a0ac", "grid": "#2c333b", "paper": "#171b20"},
}
POINTS = 800
NONE = "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `lte-scale report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where report.html and report.png go (the first RUN)")


def run(args: argparse.Namespace) -> int:
    """Write the report of `args.runs` and say where it is.

    Raises:
        ValueError: if a run, its configuration or its metrics are missing or damaged, or `args.out` is not writable.
    """
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    runs = [load(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    out: Path = args.out or paths[0]
    files = {"report.png": picture(runs), "report.html": page(runs).encode()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = out / f"{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, out / name)
            print(f"wrote {out / name}")
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out} ({error.strerror}); name another directory") from error
    return 0


# ---- what a run left behind


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its label, its configuration by dotted key, its records."""

    label: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    def column(self, key: str) -> np.ndarray:
        """One value per record as float64; NaN where there is none."""
        values = [record.get(key) for record in self.records]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def last(self, key: str) -> float:
        """The last finite value, or NaN."""
        finite = self.column(key)[np.isfinite(self.column(key))]
        return float(finite[-1]) if len(finite) else math.nan

    @property
    def seconds(self) -> float:
        """Time spent training: the mean seconds per step between records, times their steps."""
        return float(np.nansum(np.diff(self.column("step"), prepend=0.0) * self.column("step_seconds")))


def load(path: Path, label: str) -> Run:
    """Read config.yaml and metrics.jsonl of a run directory. A last line that is still being written is left out.

    Raises:
        ValueError: if either is missing, empty or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory; name one that `lte-scale train` wrote")
    lines = _read(path / "metrics.jsonl").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = ()
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None and number < len(lines):
            raise ValueError(f"{path / 'metrics.jsonl'}:{number}: damaged record {line[:40]!r}; delete that line")
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'}: holds no record yet; the run writes one every metrics.every steps")
    try:
        config = yaml.safe_load(_read(path / "config.yaml"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'}: holds {type(config).__name__}, not the sections of a configuration")
    return Run(label, flatten(config), records)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason}); a run directory holds it") from error


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; an empty section stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as tell them all apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


# ---- curves


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the values, leaving out NaN."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curve(axes: Axes, run: Run, values: np.ndarray, style: Mapping[str, Any], **changes: Any) -> None:
    """Values over optimizer steps, thinned to what a panel can show."""
    shown = np.flatnonzero(np.isfinite(values))
    if len(shown) > POINTS:
        shown = shown[np.linspace(0, len(shown) - 1, POINTS).astype(int)]
    axes.plot(run.column("step")[shown], values[shown], **{**style, **changes})


def draw_loss(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, run.column("loss"), style, alpha=0.22, linewidth=0.8)
    curve(axes, run, smooth(run.column("loss")), style)
    curve(axes, run, run.column("eval_loss"), style, **HELD_OUT)


def draw_accuracy(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, 100 * smooth(run.column("top1")), style)
    curve(axes, run, 100 * run.column("eval_top1"), style, **HELD_OUT)


def draw_throughput(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, run.column("images_per_second"), style, alpha=0.22, linewidth=0.8)
    curve(axes, run, smooth(run.column("images_per_second")), style)
    axes.set_ylim(bottom=0)


def draw_bytes(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, run.column("inter_node_bytes"), style, drawstyle="steps-post")
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))


def draw_merge_seconds(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, run.column("merge_seconds"), style, drawstyle="steps-post")


def draw_rate_and_norm(axes: Axes, run: Run, style: Mapping[str, Any]) -> None:
    curve(axes, run, run.column("lr"), style)
    if not axes.child_axes:
        right = axes.inset_axes((0.0, 0.0, 1.0, 1.0), facecolor="none")
        right.sharex(axes)
        right.yaxis.tick_right()
        right.grid(visible=False)
        right.xaxis.set_visible(False)
    curve(axes.child_axes[0], run, smooth(run.column("grad_norm")), style, linewidth=1.0, linestyle=(0, (1, 1.5)))


HELD_OUT = {"marker": "o", "markersize": 4.2, "markerfacecolor": "none", "linewidth": 0.8, "linestyle": (0, (4, 2))}
Panel = tuple[str, str, Callable[[Axes, Run, Mapping[str, Any]], None]]
PANELS: tuple[Panel, ...] = (
    ("Loss", "training (line), held-out (circles)", draw_loss),
    ("Top-1 accuracy, %", "training (line), held-out (circles)", draw_accuracy),
    ("Throughput, images per second", "whole run", draw_throughput),
    ("Bytes between nodes", "sent by one node, cumulative", draw_bytes),
    ("Time in merges, s", "cumulative", draw_merge_seconds),
    ("Learning rate and gradient norm", "rate (left, line), norm (right, dots)", draw_rate_and_norm),
)
