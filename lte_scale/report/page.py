"""The page of a report: sections one after another, all in one file that loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime

from lte_scale.report.anatomy import anatomy
from lte_scale.report.curves import CURVES, HEADS, panels, told_apart
from lte_scale.report.network import bytes_sent
from lte_scale.report.runs import Run
from lte_scale.report.style import COLOURS, sheet
from lte_scale.report.summary import best, lead, summary, tiles
from lte_scale.report.svg import figure
from lte_scale.report.tables import NONE, line, names, table
from lte_scale.report.timeline import timelines


def document(runs: Sequence[Run]) -> str:
    """The HTML page. Sections without data are left out."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = {
        "Summary": summary(runs),
        "Curves": _curves(runs),
        "Step anatomy": anatomy(runs),
        "Bytes": bytes_sent(runs),
        "Heads": _heads(runs),
        "Events": timelines(runs),
        "What differs": _differences(runs),
        "Configuration": "".join(_configuration(run) for run in runs),
    }
    shown = {name: content for name, content in sections.items() if content}
    return PAGE.format(
        title=html.escape(title),
        style=sheet(),
        lead=lead(best(runs), len(runs) - 1),
        tiles=tiles(runs[0]) if len(runs) == 1 else "",
        links="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in shown),
        sections="".join(
            f'<section><h2 id="{_anchor(name)}"><a href="#{_anchor(name)}">{name}</a></h2>\n{content}</section>\n'
            for name, content in shown.items()
        ),
        bold="; bold is the best of the runs" if len(runs) > 1 else "",
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _legend(entries: Sequence[str]) -> str:
    return '<p class="legend">' + "".join(f"<span>{entry}</span>" for entry in entries) + "</p>"


def _curves(runs: Sequence[Run]) -> str:
    drawn = "".join(figure(panel) for panel in panels(CURVES, runs))
    return (_legend(names(runs)) if len(runs) > 1 else "") + f'<div class="panels">{drawn}</div>' if drawn else ""


def _heads(runs: Sequence[Run]) -> str:
    drawn = "".join(figure(panel) for panel in panels(HEADS, runs))
    apart = [f'<i style="border-color:{COLOURS[head]}"></i>head {head}' for head in range(told_apart(runs))]
    legend = apart or (names(runs) if len(runs) > 1 else [])
    note = '<p class="note">Of the heads of node 0.</p>'
    return note + (_legend(legend) if legend else "") + f'<div class="panels">{drawn}</div>' if drawn else ""


def _differences(runs: Sequence[Run]) -> str:
    """The keys whose values are not the same in all runs."""
    if len(runs) == 1:
        return ""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run_dir")
    body = ""
    for key in keys:
        cells = [html.escape(str(run.config.get(key, NONE))) for run in runs]
        if len(set(cells)) > 1:
            body += line(f"<code>{html.escape(key)}</code>", cells)
    return table(runs, body) if body else "<p>The configurations are the same.</p>"


def _configuration(run: Run) -> str:
    lines = "\n".join(f"{key}: {value}" for key, value in run.config.items())
    return f"<details><summary>{html.escape(run.label)}</summary><pre>{html.escape(lines)}</pre></details>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title} · lte-scale</title>
<style>{style}</style>
</head>
<body>
<main>
<header><p>lte-scale report</p><h1>{title}</h1><p class="lead">{lead}</p>{tiles}<nav>{links}</nav></header>
{sections}<footer>Written by lte-scale report on {date}. Accuracy is that of the merged weights on held-out images;
bytes are those one node sent to others{bold}.</footer>
</main>
</body>
</html>
"""
