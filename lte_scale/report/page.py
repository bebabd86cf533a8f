"""The page of a report: a summary, the differences between the runs, their curves, all in one file."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lte_scale.report.curves import NONE, PANELS, THEMES, Styled, panel, styled
from lte_scale.report.runs import Run


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


def document(runs: Sequence[Run]) -> str:
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
