"""From what the nodes' endpoints say to lines of text: a heading, a row per node, the heads, what is wrong."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from lte_scale.top.figures import age, duration, mean, milliseconds, natural, number, percent, size
from lte_scale.top.node import Node, Reading, values
from lte_scale.top.problems import problems

BAR = 30
SLOWER = 1.02  # from here on a node is marked as the slowest


def lines(readings: Iterable[Reading], width: int = 80, height: int = 0) -> list[str]:
    """The state of a run, in no more than `height` lines (0: any number) of at most `width` characters."""
    readings = list(readings)
    nodes = [Node(reading.name, reading.now, reading.before) for reading in readings if reading.now]
    nodes.sort(key=lambda node: natural(node.name))
    wrong = [f"! {reading.name}: no answer: {reading.reason}" for reading in readings if not reading.now]
    wrong += [f"! {problem}" for problem in problems(nodes)]
    above = _wrapped(heading(nodes), width) if nodes else []
    below = _wrapped([*heads(nodes), *slowest_lines(nodes), *wrong], width)
    room = max(4, height - len(above) - len(below) - 1) if height else 0
    rows = ["", *table(nodes, width, room)] if nodes else []
    return [*above, *rows, *below][: height or None]


def _wrapped(texts: Iterable[str], width: int) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]]


# The heading


def heading(nodes: Sequence[Node]) -> Iterator[str]:
    """What runs, how far it is, what it has learned."""
    info = next((info for node in nodes if (info := node.now.info("lte_config_info"))), {})
    if info:
        yield (
            f"{info.get('run', '?')}  {info.get('model', '?')}  engine {info.get('engine', '?')}, "
            f"base {info.get('base_scope', '?')}, rank {info.get('rank', '?')}, {info.get('heads', '?')} heads, "
            f"merge every {info.get('merge_every', '?')}"
        )
    step, planned, left = (
        max(values(nodes, metric), default=None)
        for metric in ("lte_step", "lte_planned_steps", "lte_remaining_seconds")
    )
    if step is None:
        yield "no step ended yet"
    elif planned:
        done = min(1.0, step / planned)
        bar = "#" * int(BAR * done)
        remaining = "" if left is None else f"  left {duration(left)}"
        yield f"step {step:,.0f}/{planned:,.0f} [{bar:-<{BAR}}] {100 * done:.1f} %{remaining}"
    else:
        yield f"step {step:,.0f}"
    pace = values(nodes, "lte_images_per_second")
    yield "  ".join(
        (
            f"loss {number(mean(values(nodes, 'lte_loss')), '.3f')}",
            f"top-1 {percent(mean(values(nodes, 'lte_top1_ratio')))}",
            f"held-out top-1 {percent(max(values(nodes, 'lte_eval_top1_ratio'), default=None))}",
            f"lr {number(mean(values(nodes, 'lte_learning_rate')), '.2e')}",
            f"images/s {number(sum(pace) if pace else None, ',.0f')}",
        )
    )


def heads(nodes: Sequence[Node]) -> Iterator[str]:
    """Whether the heads learn different things."""
    cosine = mean(values(nodes, "lte_head_cosine_mean"))
    norms = values(nodes, "lte_head_delta_norm")
    if cosine is None and not norms:
        return
    yield ""
    yield "  ".join(
        (
            f"heads: cosine {number(cosine, '.3f')}",
            f"(max {number(max(values(nodes, 'lte_head_cosine_max'), default=None), '.3f')})",
            f"effective rank {number(mean(values(nodes, 'lte_merged_delta_effective_rank')), '.1f')}",
            f"({percent(mean(values(nodes, 'lte_merged_delta_rank_ratio')))} of the highest)",
            f"delta norm {number(min(norms, default=None), '.3g')} to {number(max(norms, default=None), '.3g')}",
        )
    )


# The table


def slowest(nodes: Sequence[Node]) -> tuple[Node, float, float] | None:
    """The node that takes most time of its own for a step, that time, and the shortest; None where all are alike."""
    seconds = [(own, node) for node in nodes if (own := node.own_seconds) is not None]
    if len(seconds) < 2:
        return None
    (longest, node), (shortest, _) = max(seconds, key=lambda s: s[0]), min(seconds, key=lambda s: s[0])
    return (node, longest, shortest) if longest > SLOWER * shortest else None


def slowest_lines(nodes: Sequence[Node]) -> Iterator[str]:
    """What the mark in the table means."""
    if found := slowest(nodes):
        node, longest, shortest = found
        yield ""
        yield (
            f"* node {node.name} is the slowest: {milliseconds(longest)} ms a step of its own work, "
            f"the fastest takes {milliseconds(shortest)} ms"
        )


Column = tuple[str, int, Callable[[Node], str]]
# Title, importance (the least important go where the terminal is narrow), cell.
COLUMNS: Sequence[Column] = (
    ("images/s", 99, lambda n: number(n.now.value("lte_images_per_second"), ",.0f")),
    ("step ms", 98, lambda n: milliseconds(n.step_seconds)),
    ("data", 97, lambda n: percent(n.share("data_wait"))),
    ("merge", 96, lambda n: percent(n.share("merge"))),
    ("fwd+bwd", 95, lambda n: percent(n.share("forward", "backward"))),
    ("MFU", 93, lambda n: percent(n.now.value("lte_mfu_ratio"))),
    ("peak", 91, lambda n: size(n.memory_peak)),
    ("sent/s", 88, lambda n: size(n.bytes_per_second)),
    ("sent/image", 92, lambda n: size(n.bytes_per_image)),
    ("skipped", 87, lambda n: f"{n.now.total('lte_skipped_steps_total'):,.0f}"),
    ("bad", 86, lambda n: f"{n.now.total('lte_bad_samples_total'):,.0f}"),
    ("last step", 94, lambda n: age(n.age("lte_rank_step_timestamp_seconds"))),
    ("checkpoint", 90, lambda n: age(n.age("lte_checkpoint_timestamp_seconds"))),
)


def table(nodes: Sequence[Node], width: int, room: int = 0) -> list[str]:
    """A row per node, the slowest ones where there is room for few."""
    found = slowest(nodes)
    left = 0
    if room and len(nodes) + 1 > room:
        left = len(nodes) - (room - 2)
        nodes = sorted(nodes, key=lambda node: -(node.own_seconds or math.inf))[: room - 2]
    marks = [node.name + (" *" if found and found[0] is node else "  ") for node in nodes]
    columns = [["node", *marks]]
    columns += [[title, *map(cell, nodes)] for title, _, cell in COLUMNS]
    widths = [max(map(len, column)) for column in columns]
    shown = set(range(len(columns)))
    for index in sorted(range(1, len(columns)), key=lambda index: COLUMNS[index - 1][1]):
        if sum(widths[i] + 2 for i in shown) - 2 <= width:
            break
        shown.remove(index)
    texts = []
    for row in range(len(nodes) + 1):
        cells = [columns[i][row].rjust(widths[i]) for i in sorted(shown) if i]
        texts.append("  ".join([columns[0][row].ljust(widths[0]), *cells])[:width].rstrip())
    return [*texts, f"... and {left} nodes more; those above are the slowest"] if left else texts
