"""The figures of a run between two points in time, and where they go first: metrics.jsonl and the progress line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of metrics.jsonl. Seconds, bytes, ratios of 1; counters are cumulative over the whole run.

    Attributes:
        loss, top1, grad_norm: training loss, top-1 ratio and gradient norm, averaged over `heads` heads and the steps
            since the previous record.
        images_per_second, step_seconds: over the same steps, of the whole run.
        images, data_wait_seconds, merge_seconds, inter_node_bytes, intra_node_bytes, skipped_steps, bad_samples,
            bad_shards, restarts: counters.
        mfu: model FLOP per second over the peak; None where the peak is unknown.
        time: when it was taken, in Unix time.
        phase_seconds: counters of the time in each phase (`catalogue.PHASES`), means over node 0's ranks.
        sent_bytes: counters of the bytes that node 0 has sent, by `scope/purpose`.
        full_rank_bytes: what it would have sent to other nodes by full-rank DDP (fp32 gradients) on as many steps.
        memory_peak_bytes: the largest of node 0's ranks.
        head_loss, head_grad_norm: means of each of node 0's heads, since the previous record.
        head_delta_norm, head_cosine_mean, head_cosine_max, delta_effective_rank, delta_rank_ratio: the health of
            node 0's heads as `catalogue` has it; None, and left out of the file, where it was not measured.
        eval_top1, eval_top5, eval_loss: held-out figures; likewise.
    """

    step: int
    epoch: float
    images: int
    loss: float
    top1: float
    lr: float
    grad_norm: float
    images_per_second: float
    step_seconds: float
    data_wait_seconds: float
    merge_seconds: float
    inter_node_bytes: int
    intra_node_bytes: int
    mfu: float | None
    heads: int
    skipped_steps: int
    bad_samples: int
    bad_shards: int
    restarts: int
    time: float
    phase_seconds: Mapping[str, float]
    sent_bytes: Mapping[str, int]
    full_rank_bytes: int
    memory_peak_bytes: int
    head_loss: Sequence[float]
    head_grad_norm: Sequence[float]
    head_delta_norm: Sequence[float] | None = None
    head_cosine_mean: float | None = None
    head_cosine_max: float | None = None
    delta_effective_rank: float | None = None
    delta_rank_ratio: float | None = None
    eval_top1: float | None = None
    eval_top5: float | None = None
    eval_loss: float | None = None


_OPTIONAL = ("eval_", "head_delta_", "head_cosine_", "delta_")


class JsonlWriter:
    """Appends one JSON object per record; a reader sees whole lines only, but for a last one torn by a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        """Append a record. Non-finite floats become null, which JSON has no other word for."""
        values: dict[str, Any] = asdict(record)
        finite = {k: _finite(v) for k, v in values.items()}
        line = {k: v for k, v in finite.items() if not (k.startswith(_OPTIONAL) and values[k] is None)}
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def rewind(self, step: int) -> None:
        """Forget records after `step`, and torn lines: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines() if _step_of(line) <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)

    def close(self) -> None:
        """Nothing is held open between records."""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(v) for v in value] if isinstance(value, list) else value


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def format_progress(record: Record, total_steps: int, seconds_left: float) -> str:
    """The line that shows a record: what was learnt, how fast, what merges took and sent so far, what remains."""
    total = f"{total_steps:,}"
    parts = [
        f"step {record.step:>{len(total)},}/{total}",
        f"epoch {record.epoch:.1f}",
        f"loss {record.loss:.3f}",
        f"top-1 {100 * record.top1:4.1f} %",
        f"{record.images_per_second:,.0f} images/s",
        f"merge {record.merge_seconds:.2f} s",
        f"inter-node {_bytes(record.inter_node_bytes)}",
        f"left {_clock(seconds_left)}",
    ]
    if record.eval_top1 is not None:
        parts.append(f"| eval top-1 {100 * record.eval_top1:.1f} %")
    if record.eval_top5 is not None:
        parts.append(f"top-5 {100 * record.eval_top5:.1f} %")
    if record.eval_loss is not None:
        parts.append(f"loss {record.eval_loss:.3f}")
    return "  ".join(parts)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.95 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def format_summary(record: Record, best_top1: float, seconds: float) -> list[str]:
    """The table at the end of a run. `seconds`: since it was last started."""
    spent = sum(record.phase_seconds.values())
    shares = sorted(record.phase_seconds.items(), key=lambda item: -item[1])
    where = ", ".join(
        f"{phase} {100 * part / spent:.0f} %" for phase, part in shares if spent and part / spent >= 0.005
    )
    sent, reference = record.inter_node_bytes, record.full_rank_bytes
    network = f"{_bytes(sent)} sent by a node, {sent / record.images:,.0f} B per image"
    if sent and reference:
        network += f"; full-rank DDP sends {reference / sent:,.0f} times as much"
    bad, skipped = record.bad_samples, record.skipped_steps
    rows = {
        "steps": f"{record.step:,}, {record.images:,} images, {record.epoch:.1f} epochs",
        "speed": f"{record.images_per_second:,.0f} images/s at the end; {_clock(seconds)} since the start",
        "learning": f"loss {record.loss:.3f}, top-1 {100 * record.top1:.1f} %"
        + (f"; best held-out top-1 {100 * best_top1:.2f} %" if best_top1 else ""),
        "time in": where,
        "network": network if reference else "one node",
        "faults": f"{record.restarts} restarts, {skipped} skipped steps, {bad} damaged samples",
    }
    return [f"  {name:<9}{text}" for name, text in rows.items() if text]
