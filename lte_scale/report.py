"""`lte-scale report`: curves and a comparison of runs, as a picture and as one self-contained HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
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
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

# Okabe and Ito's colours, told apart with any colour vision; from the seventh run on, another dash.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
THEMES = {
    "light": {"ink": "#22272e", "soft": "#6b7480", "grid": "#e6e9ed", "paper": "#ffffff"},
    "dark": {"ink": "#e3e7ec", "soft": "#96a0ac", "grid": "#2c333b", "paper": "#171b20"},
}
POINTS = 800
NONE = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `lte-scale report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where report.html and report.png go (the first RUN)")


def run(args: argparse.Namespace) -> int:
    """Write the report of `args.runs` and say where it is.

    Raises:
        ValueError: if a run lacks its configuration or metrics, if they are damaged, or if nothing can be written.
    """
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    runs = [load(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    out: Path = args.out or args.runs[0]
    files = {"report.png": picture(runs), "report.html": page(runs).encode()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _publish(out / name, content)
    except OSError as error:
        raise ValueError(f"cannot write to {out} ({error.strerror}); name another directory with --out") from error
    for name in files:
        print(f"wrote {out / name}")
    return 0


def _publish(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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

Style = Mapping[str, Any]
Styled = Sequence[tuple[Run, Style]]
FAINT = {"alpha": 0.25, "linewidth": 0.8}
HELD_OUT = {"marker": "o", "markersize": 4.0, "markerfacecolor": "none", "linewidth": 0.8, "linestyle": (0, (4, 2))}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
DOTS = {"linewidth": 1.1, "linestyle": (0, (1, 1.4))}


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the values, leaving out NaN."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite, window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curve(axes: Axes, run: Run, values: np.ndarray, style: Style, changes: Style | None = None) -> None:
    """Values over optimizer steps, thinned to what a panel can show."""
    shown = np.flatnonzero(np.isfinite(values))
    if len(shown) > POINTS:
        shown = shown[np.linspace(0, len(shown) - 1, POINTS).astype(int)]
    axes.plot(run.column("step")[shown], values[shown], **{**style, **(changes or {})})


def draw_loss(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("loss"), style, FAINT)
        curve(axes, run, smooth(run.column("loss")), style)
        curve(axes, run, run.column("eval_loss"), style, HELD_OUT)


def draw_accuracy(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, 100 * smooth(run.column("top1")), style)
        curve(axes, run, 100 * run.column("eval_top1"), style, HELD_OUT)


def draw_throughput(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("images_per_second"), style, FAINT)
        curve(axes, run, smooth(run.column("images_per_second")), style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(THOUSANDS)


def draw_bytes(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("inter_node_bytes"), style, {"drawstyle": "steps-post"})
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))


def draw_merge_seconds(axes: Axes, runs: Styled) -> None:
    for run, style in runs:
        curve(axes, run, run.column("merge_seconds"), style, {"drawstyle": "steps-post"})


def draw_rate_and_norm(axes: Axes, runs: Styled) -> None:
    right = axes.twinx()
    for run, style in runs:
        curve(axes, run, run.column("lr"), style)
        curve(right, run, smooth(run.column("grad_norm")), style, DOTS)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    right.set_ylim(bottom=0)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    right.grid(visible=False)


PANELS: tuple[tuple[str, str, Callable[[Axes, Styled], None]], ...] = (
    ("Loss", "training (line), held-out (circles)", draw_loss),
    ("Top-1 accuracy, %", "training (line), held-out (circles)", draw_accuracy),
    ("Throughput, images per second", "of the whole run", draw_throughput),
    ("Bytes between nodes", "sent by one node, cumulative", draw_bytes),
    ("Time in merges, seconds", "cumulative", draw_merge_seconds),
    ("Learning rate and gradient norm", "rate (left, line), norm (right, dots)", draw_rate_and_norm),
)


def styled(runs: Sequence[Run]) -> Styled:
    """Every run with its colour and dash, the same in all panels."""
    looks = [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(len(runs))]
    return [(run, {"color": c, "linestyle": d, "linewidth": 1.7}) for run, (c, d) in zip(runs, looks, strict=True)]


def theme(name: str) -> dict[Any, Any]:
    """matplotlib settings of the light or dark look."""
    look = THEMES[name]
    return {
        "figure.facecolor": look["paper"], "axes.facecolor": "none", "savefig.facecolor": look["paper"],
        "text.color": look["ink"], "axes.labelcolor": look["soft"], "axes.edgecolor": look["grid"],
        "xtick.color": look["soft"], "ytick.color": look["soft"], "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": look["grid"], "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.formatter.use_mathtext": True, "font.size": 9, "svg.hashsalt": "lte-scale",
    }  # fmt: skip


def draw(axes: Axes, plot: Callable[[Axes, Styled], None], runs: Sequence[Run]) -> None:
    """One panel without its title."""
    axes.margins(x=0.02)
    plot(axes, styled(runs))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    for each in axes.figure.axes:
        each.locator_params(axis="y", nbins=6)


def picture(runs: Sequence[Run]) -> bytes:
    """All panels as one PNG."""
    with mpl.rc_context(theme("light")):
        figure = Figure(figsize=(14, 7.6), dpi=150)
        grid = figure.subplots(2, 3)
        for axes, (title, subtitle, plot) in zip(grid.flat, PANELS, strict=True):
            draw(axes, plot, runs)
            axes.annotate(title, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=11, fontweight="bold")
            axes.annotate(subtitle, (0, 1), (0, 8), "axes fraction", "offset points", color=THEMES["light"]["soft"])
        for axes in grid[1]:
            axes.set_xlabel("optimizer step")
        handles = [Line2D([], [], label=run.label, **style) for run, style in styled(runs)]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.038, 0.995), ncols=6, frameon=False)
        figure.subplots_adjust(left=0.045, right=0.965, bottom=0.07, top=0.86, hspace=0.42, wspace=0.2)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def panel(plot: Callable[[Axes, Styled], None], runs: Sequence[Run], look: str) -> str:
    """One panel in one look as the data URI of an SVG image."""
    with mpl.rc_context(theme(look)):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.subplots()
        draw(axes, plot, runs)
        axes.set_xlabel("optimizer step")
        content = io.BytesIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


# ---- figures


def count(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def size(value: float) -> str:
    """Bytes with a decimal prefix and three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" and value == int(value) else max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:,.{digits}f} {unit}"


def clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def over(run: Run, key: str, reduce: Callable[[np.ndarray], Any]) -> float:
    """`reduce` over the finite values of a column; NaN if there are none."""
    values = run.column(key)
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else math.nan


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def period(run: Run) -> str:
    every, local = run.config.get("merge.every", NONE), run.config.get("merge.local_every")
    return f"{every} (in the node {local})" if local else str(every)


def share(run: Run, key: str) -> float:
    """A counter of seconds over the time spent training."""
    return ratio(run.last(key), run.seconds)


def bytes_per_image(run: Run) -> float:
    return ratio(run.last("inter_node_bytes"), run.last("images"))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the comparison. `best` (max or min) picks the value that is shown in bold."""

    label: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str] = str
    best: Callable[[list[float]], float] | None = None


ROWS: Mapping[str, Sequence[Row]] = {
    "Configuration": (
        Row("Model", lambda run: run.config.get("model.name")),
        Row("Heads", lambda run: over(run, "heads", np.max), count),
        Row("Rank r", lambda run: run.config.get("adapters.rank")),
        Row("Merge period T, steps", period),
        Row("Scope of the base", lambda run: run.config.get("base.scope")),
        Row("Engine", lambda run: run.config.get("engine.name", run.config.get("engine"))),
    ),
    "Learning": (
        Row("Steps", lambda run: over(run, "step", np.max), count),
        Row("Images", lambda run: over(run, "images", np.max), count),
        Row("Best held-out top-1", lambda run: over(run, "eval_top1", np.max), percent, max),
        Row("Last held-out top-1", lambda run: run.last("eval_top1"), percent, max),
        Row("Skipped steps", lambda run: run.last("skipped_steps"), count),
        Row("Damaged samples", lambda run: run.last("bad_samples"), count),
    ),
    "Cost": (
        Row("Images per second, median", lambda run: over(run, "images_per_second", np.median), count, max),
        Row("MFU, median", lambda run: over(run, "mfu", np.median), percent, max),
        Row("Training time", lambda run: run.seconds, clock),
        Row("Share of it in merges", lambda run: share(run, "merge_seconds"), percent, min),
        Row("Share of it waiting for data", lambda run: share(run, "data_wait_seconds"), percent, min),
        Row("Bytes between nodes", lambda run: run.last("inter_node_bytes"), size),
        Row("Bytes between nodes, per image", bytes_per_image, size, min),
    ),
}


# ---- the page


def page(runs: Sequence[Run]) -> str:
    """The HTML page: summary, curves, differences, configurations. It loads nothing from anywhere."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    figures = "".join(_figure(title, subtitle, plot, runs) for title, subtitle, plot in PANELS)
    return PAGE.format(
        title=html.escape(title),
        style=STYLE + _variables("light") + f"@media (prefers-color-scheme: dark) {{{_variables('dark')}}}",
        lead=_lead(max(runs, key=lambda run: np.nan_to_num(over(run, "eval_top1", np.max), nan=-1.0))),
        summary=_table(runs, _summary(runs)),
        legend="".join(f"<span>{name}</span>" for name in _names(runs)) if len(runs) > 1 else "",
        figures=figures,
        differences=_differences(runs),
        configurations="".join(_configuration(run) for run in runs),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _variables(look: str) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in THEMES[look].items()) + "}"


def _lead(run: Run) -> str:
    top1, merges = over(run, "eval_top1", np.max), share(run, "merge_seconds")
    result = "trained" if math.isnan(top1) else f"reached {percent(top1)} held-out top-1"
    parts = [f"{run.label} {result} in {count(over(run, 'step', np.max))} steps"]
    if math.isfinite(merges):
        sent = bytes_per_image(run)
        network = f", a node sent {size(sent)} per image to others" if math.isfinite(sent) else ""
        parts.append(f"merges took {percent(merges)} of the time{network}")
    return html.escape("; ".join(parts) + ".")


def _shown(row: Row, values: Sequence[Any]) -> list[str]:
    """The cells of a row, the best in bold where runs differ."""
    missing = [value is None or (isinstance(value, float) and not math.isfinite(value)) for value in values]
    known = [value for value, gone in zip(values, missing, strict=True) if not gone]
    texts = [NONE if gone else html.escape(row.show(value)) for value, gone in zip(values, missing, strict=True)]
    if row.best is None or len(set(known)) < 2:
        return texts
    best = row.best(known)
    return [f"<strong>{t}</strong>" if value == best else t for t, value in zip(texts, values, strict=True)]


def _summary(runs: Sequence[Run]) -> str:
    body = ""
    for section, rows in ROWS.items():
        body += f'<tr class="section"><th colspan="{len(runs) + 1}" scope="rowgroup">{section}</th></tr>'
        for row in rows:
            cells = _shown(row, [row.value(run) for run in runs])
            if set(cells) != {NONE}:
                body += _line(html.escape(row.label), cells)
    return body


def _line(label: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _names(runs: Sequence[Run]) -> list[str]:
    """The label of every run after the colour of its curves."""
    return [f'<i style="border-color:{style["color"]}"></i>{html.escape(run.label)}' for run, style in styled(runs)]


def _table(runs: Sequence[Run], body: str) -> str:
    heads = "".join(f'<th scope="col">{name}</th>' for name in _names(runs))
    return f'<div class="wide"><table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, subtitle: str, plot: Callable[[Axes, Styled], None], runs: Sequence[Run]) -> str:
    return (
        f"<figure><figcaption><b>{title}</b><span>{subtitle}</span></figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{panel(plot, runs, "dark")}">'
        f'<img src="{panel(plot, runs, "light")}" alt="{title} over optimizer steps"></picture></figure>\n'
    )


def _differences(runs: Sequence[Run]) -> str:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run_dir")
    body = ""
    for key in keys:
        cells = [html.escape(str(run.config.get(key, NONE))) for run in runs]
        if len(set(cells)) > 1:
            body += _line(f"<code>{html.escape(key)}</code>", cells)
    if len(runs) == 1:
        return ""
    return "<h2>What differs</h2>" + (_table(runs, body) if body else "<p>The configurations are the same.</p>")


def _configuration(run: Run) -> str:
    lines = "\n".join(f"{key}: {value}" for key, value in run.config.items())
    return f"<details><summary>{html.escape(run.label)}</summary><pre>{html.escape(lines)}</pre></details>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} · lte-scale</title>
<style>{style}</style>
<main>
<header><p>lte-scale report</p><h1>{title}</h1><p class="lead">{lead}</p></header>
{summary}
<h2>Curves</h2>
<p class="legend">{legend}</p><div class="panels">{figures}</div>
{differences}
<h2>Configuration</h2>
{configurations}
<footer>Written by lte-scale report on {date}. Accuracy is that of the merged weights on held-out images;
bytes are those one node sent to others; bold is the best of the runs.</footer>
</main>
</html>
"""

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:48px 24px 64px}
header p{margin:0;color:var(--soft)}
header p:first-child{font-size:12px;letter-spacing:.09em;text-transform:uppercase}
h1{margin:2px 0 8px;font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em}
h2{margin:52px 0 14px;font-size:18px;font-weight:650}
header .lead{margin-bottom:32px;max-width:70ch;font-size:16px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 28px 5px 0;text-align:left;border-bottom:1px solid var(--grid)}
td,thead th{text-align:right;padding:5px 0 5px 36px}
thead th{font-weight:650}
tbody th{position:sticky;left:0;background:var(--paper);font-weight:400;color:var(--soft)}
tr.section th{padding-top:20px;font-size:12px;letter-spacing:.06em;text-transform:uppercase}
.legend{margin:0 0 18px}
.legend span{margin-right:28px}
i{display:inline-block;width:20px;margin-right:8px;border-top:3px solid;vertical-align:middle}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:32px 36px}
figure{margin:0;min-width:0}
figcaption b{display:block;font-weight:650}
figcaption span,footer{color:var(--soft);font-size:13px}
img{display:block;width:100%;height:auto;margin-top:6px}
code,pre{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{border-bottom:1px solid var(--grid);padding:8px 0}
summary{cursor:pointer}
pre{margin:8px 0 0;overflow-x:auto;color:var(--soft)}
footer{margin-top:48px}
@media print{main{padding:0}details{display:none}}
"""
