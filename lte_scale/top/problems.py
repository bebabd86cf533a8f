"""What is wrong with a run, as far as its nodes' endpoints tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lte_scale.top.figures import duration, natural, percent
from lte_scale.top.node import Node, values

DATA_BOUND = 0.1
STUCK_SECONDS = 60.0
STUCK_STEPS = 10.0


def problems(nodes: Sequence[Node]) -> Iterator[str]:
    """What somebody should look at."""
    yield from stuck(nodes)
    for node in nodes:
        name, now = f"node {node.name}", node.now
        wild = [head for head, loss in now.by("head", "lte_loss").items() if not math.isfinite(loss)]
        if wild:
            yield f"{name}: the loss of head {', '.join(sorted(wild, key=natural))} is not finite"
        skipped = {head: n for head, n in now.by("head", "lte_skipped_steps_total").items() if n}
        if skipped:
            each = ", ".join(f"{skipped[head]:,.0f} of head {head}" for head in sorted(skipped, key=natural))
            yield f"{name}: steps skipped for a loss or gradient that is not finite: {each}"
        withdrawn = [head for head, n in now.by("head", "lte_withdrawn_heads_total").items() if n]
        if withdrawn:
            yield f"{name}: diverged and started again: head {', '.join(sorted(withdrawn, key=natural))}"
        samples, shards = now.total("lte_bad_samples_total"), now.total("lte_bad_shards_total")
        if samples or shards:
            yield f"{name}: damaged data skipped: samples {samples:,.0f}, whole shards {shards:,.0f}"
        if failed := now.total("lte_checkpoints_total", result="failed"):
            yield f"{name}: checkpoints that failed: {failed:,.0f}; the reason is in the run's events.log"
        waiting = node.share("data_wait")
        if waiting is not None and waiting > DATA_BOUND:
            yield f"{name}: waits for data {percent(waiting)} of its time: raise data.workers, or use faster storage"


def stuck(nodes: Sequence[Node]) -> Iterator[str]:
    """Ranks that have ended no step for long: those behind the others, or else all that wait."""
    planned = max(values(nodes, "lte_planned_steps"), default=math.inf)
    reached = max(values(nodes, "lte_rank_step"), default=0.0)
    late: dict[tuple[str, float], list[tuple[str, float]]] = {}
    for node in nodes:
        limit = max(STUCK_SECONDS, STUCK_STEPS * (node.step_seconds or 0.0))
        steps = node.now.by("local_rank", "lte_rank_step")
        for rank, ended in node.now.by("local_rank", "lte_rank_step_timestamp_seconds").items():
            age, step = node.now.time - ended, steps.get(rank, 0.0)
            if ended > 0 and age > limit and step < planned:
                late.setdefault((node.name, step), []).append((rank, age))
    behind = [key for key in late if key[1] < reached]
    for key in behind or late:
        name, step = key
        ranks = ", ".join(sorted((rank for rank, _ in late[key]), key=natural))
        silence = duration(max(age for _, age in late[key]))
        yield (
            f"node {name}: rank {ranks} has ended no step for {silence}, at step {step:,.0f}"
            + (f" where others have ended {reached:,.0f}" if key in behind else " like all others")
        )
