"""A run in words, in a few large figures, and in a table beside others."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lte_scale.report.anatomy import largest_part
from lte_scale.report.network import fewer, per_image
from lte_scale.report.runs import Run
from lte_scale.report.tables import NONE, Row, section, table
from lte_scale.report.timeline import cadence
from lte_scale.report.words import clock, count, percent, portion, ratio, several, size, times, unbroken


def period(run: Run) -> str:
    found = cadence(run)
    if found is None:
        return NONE
    return f"{found.every} ({found.levels})" if found.two_level else str(found.every)


def share(run: Run, key: str) -> float:
    """A counter of seconds over the time spent training."""
    return ratio(run.last(key), run.seconds)


def restarts(run: Run) -> float:
    """By the records; where they do not tell, by the events."""
    told = run.over("restarts", np.max)
    return told if math.isfinite(told) else float(sum(event.kind == "restart" for event in run.events))


def state(run: Run) -> str:
    """Whether the run has ended, failed or stopped, or how far it has come."""
    planned = run.planned
    reached = f"at step {count(run.step)}" + (f" of {count(planned)}" if math.isfinite(planned) else "")
    if run.step >= planned:
        return "ended"
    turns = [event.kind for event in run.events if event.kind in ("start", "restart", "stop", "error")]
    return {"stop": "stopped ", "error": "failed "}.get(turns[-1] if turns else "", "") + reached


ROWS: Mapping[str, Sequence[Row]] = {
    "Configuration": (
        Row("Model", lambda run: run.config.get("model.name")),
        Row("Heads", lambda run: run.over("heads", np.max), count),
        Row("Rank r", lambda run: run.config.get("adapters.rank")),
        Row("Merge period T, steps", period),
        Row("Scope of the base", lambda run: run.config.get("base.scope")),
        Row("Engine", lambda run: run.config.get("engine.name", run.config.get("engine"))),
    ),
    "Learning": (
        Row("State", state),
        Row("Steps", lambda run: run.over("step", np.max), count),
        Row("Images", lambda run: run.over("images", np.max), count),
        Row("Best held-out top-1", lambda run: run.over("eval_top1", np.max), percent, max),
        Row("Last held-out top-1", lambda run: run.last("eval_top1"), percent, max),
        Row("Restarts", restarts, count),
        Row("Skipped steps", lambda run: run.last("skipped_steps"), count),
        Row("Damaged samples", lambda run: run.last("bad_samples"), count),
        Row("Damaged shards", lambda run: run.last("bad_shards"), count),
    ),
    "Cost": (
        Row("Images per second, median", lambda run: run.over("images_per_second", np.median), count, max),
        Row("MFU, median", lambda run: run.over("mfu", np.median), percent, max),
        Row("Training time", lambda run: run.seconds, clock),
        Row("Share of it in merges", lambda run: share(run, "merge_seconds"), percent, min),
        Row("Share of it waiting for data", lambda run: share(run, "data_wait_seconds"), percent, min),
        Row("Memory peak of a rank", lambda run: run.over("memory_peak_bytes", np.max), size, min),
        Row("Bytes between nodes", lambda run: run.last("inter_node_bytes"), size),
        Row("Bytes between nodes, per image", lambda run: per_image(run, "inter_node_bytes"), size, min),
        Row("By full-rank DDP, per image", lambda run: per_image(run, "full_rank_bytes"), size),
    ),
}


def summary(runs: Sequence[Run]) -> str:
    """One table to compare runs; of a single run a table per section, side by side."""
    sections = [section(name, rows, runs) for name, rows in ROWS.items()]
    if len(runs) > 1:
        return table(runs, "".join(sections))
    return '<div class="parts">' + "".join(table(runs, body) for body in sections if body) + "</div>"


def best(runs: Sequence[Run]) -> Run:
    """The run of the highest held-out accuracy; without any, the first."""
    return max(runs, key=lambda run: np.nan_to_num(run.over("eval_top1", np.max), nan=-1.0))


def lead(run: Run, others: int) -> str:
    """What the run reached, at which pace, what was slow, what it sent, what went wrong."""
    merging = share(run, "merge_seconds")
    merged = f"Merges took {portion(merging)} of the time." if math.isfinite(merging) else ""
    sentences = [_result(run, others), _pace(run), largest_part(run) or merged, _network(run), _mishaps(run)]
    return html.escape(unbroken(" ".join(filter(None, sentences))))


def _result(run: Run, others: int) -> str:
    top1, planned = run.over("eval_top1", np.max), run.planned
    result = "trained" if math.isnan(top1) else f"reached {percent(top1)} held-out top-1"
    name = f"The best of {others + 1} runs, {run.label}," if others and not math.isnan(top1) else run.label
    text = f"{name} {result} in {several(run.step, 'step')}"
    now = state(run)
    if now == "ended":
        return text + "; the run has ended."
    if math.isnan(planned):
        return text + "."
    left = run.last("step_seconds") * (planned - run.step)
    text += f" of {count(planned)} ({100 * run.step / planned:.0f} %)"
    if now.startswith("stopped"):
        return text + ", where it was stopped; the same command resumes it."
    if now.startswith("failed"):
        error = [event for event in run.events if event.kind == "error"][-1]
        return f"{text}, where it failed: {error.message[:300]}."
    return text + (f"; at the present pace, {clock(left)} remain." if math.isfinite(left) else ".")


def _pace(run: Run) -> str:
    images, speed = run.over("images", np.max), run.over("images_per_second", np.median)
    if not (math.isfinite(images) and math.isfinite(speed)):
        return ""
    return f"It saw {count(images)} images in {clock(run.seconds)}, {count(speed)} per second at the median."


def _network(run: Run) -> str:
    sent = per_image(run, "inter_node_bytes")
    if not math.isfinite(sent):
        return ""
    if sent == 0:
        return "Nothing crossed between nodes."
    compared = f", {fewer(run)}" if fewer(run) else ""
    return f"A node sent {size(sent)} per image to others{compared}."


def _mishaps(run: Run) -> str:
    figures = [
        (restarts(run), "restart"),
        (run.last("skipped_steps"), "skipped step"),
        (run.last("bad_samples"), "damaged sample"),
        (run.last("bad_shards"), "damaged shard"),
        (sum(event.kind == "error" for event in run.events), "error"),
        (sum(event.kind == "warning" for event in run.events), "warning"),
    ]
    told = [several(number, one) for number, one in figures if number > 0]
    if not told:
        return "Nothing went wrong."
    return "On the way: " + ", ".join(told) + "."


def tiles(run: Run) -> str:
    """A few large figures."""
    shown = [
        ("best held-out top-1", run.over("eval_top1", np.max), percent),
        ("images per second", run.over("images_per_second", np.median), count),
        ("of training", run.seconds, clock),
        ("per image between nodes", per_image(run, "inter_node_bytes"), size),
        ("memory peak of a rank", run.over("memory_peak_bytes", np.max), size),
    ]
    factor = ratio(run.last("full_rank_bytes"), run.last("inter_node_bytes"))
    if factor > 1:
        shown.insert(4, ("fewer bytes than full-rank DDP", factor, lambda factor: f"{times(factor)} \u00d7"))
    known = [(name, show(value)) for name, value, show in shown if math.isfinite(value)]
    return '<div class="tiles">' + "".join(f"<div><b>{v}</b><span>{n}</span></div>" for n, v in known) + "</div>"
