"""What differs between nodes, who caused a failure, and how node 0 says it. Functions of what was reported alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

from lte_scale.preflight.local import Report, size

CLOCK_SECONDS = 2.0
Named = Callable[[int], str]

_CONSEQUENCE = re.compile(r"onnect|timed? ?out|timeout|NCCL|Broken pipe|socket", re.IGNORECASE)
"""What a rank says when another one is gone, or does not answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node does not pass, in one line."""

    node: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How the all-reduce of a rank ended.

    Attributes:
        order: of the failures, which was first.
        died: its process ended without a word.
        inside, between: bytes per second that it sent, inside the node and to the other nodes.
    """

    order: int = 0
    failure: str = ""
    died: bool = False
    inside: float = 0.0
    between: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Answer:
        return Answer(**json.loads(text))


def own_failures(reports: Mapping[int, Report]) -> list[Failure]:
    return [Failure(node, reason) for node, report in reports.items() for reason in report.failures]


def differences(reports: Mapping[int, Report], named: Named) -> list[Failure]:
    """What sets a node apart from most others. Nodes that fail by themselves are not compared."""
    sound = {node: report for node, report in reports.items() if not report.failures}
    versions = sorted({name for report in sound.values() for name in report.versions})
    compared: list[tuple[str, Callable[[Report], str], str]] = [
        ("ranks (NPROC):", lambda report: str(report.ranks), "start as many on every node"),
        ("GPUs:", lambda report: report.gpu_text, "use nodes with equal GPUs, all visible"),
        *((f"{v}:", lambda report, v=v: report.versions.get(v, "none"), "install the same") for v in versions),
        *(
            (
                f"{key}: samples:",
                lambda report, key=key: str(report.samples.get(key, 0)),
                "give all nodes the same data",
            )
            for key in ("data.train", "data.val")
        ),
    ]
    found = []
    for what, of, todo in compared:
        values = {node: of(report) for node, report in sound.items()}
        usual = Counter(values.values()).most_common(1)[0][0] if values else ""
        for node, value in values.items():
            if value != usual:
                other = named(next(other for other, its in values.items() if its == usual))
                found.append(Failure(node, f"{what} {value} here, {usual} on {other}; {todo}"))
    return found


def clock_offset(sent: float, answered: float, received: float) -> tuple[float, bool]:
    """Seconds that a clock is ahead which read `answered` between `sent` and `received`, and whether it is too far.

    What a slow answer leaves uncertain is not held against it.
    """
    offset = answered - (sent + received) / 2
    return offset, abs(offset) > CLOCK_SECONDS + (received - sent) / 2


def cause(
    answers: Mapping[int, Answer], stages: Mapping[int, int], ranks: Collection[int], seconds: float
) -> dict[int, str]:
    """The reason why the all-reduce failed, by the rank or ranks that caused it; empty where all is well.

    When one rank fails or hangs, others fail for its silence. A process that died is the cause before all others, then
    the first error of its own kind, then ranks that say nothing although others have noticed.

    Args:
        stages: how far each rank had come.
        seconds: since the start.
    """
    failed = sorted((rank for rank in answers if answers[rank].failure), key=lambda rank: answers[rank].order)
    silent = [rank for rank in ranks if rank not in answers]
    first = [rank for rank in failed if answers[rank].died] or [
        rank for rank in failed if not _CONSEQUENCE.search(answers[rank].failure)
    ]
    if not first and silent:
        least = min(stages.get(rank, 0) for rank in silent)
        if least <= min((stages.get(rank, 0) for rank in failed), default=least):
            behind = [rank for rank in silent if stages.get(rank, 0) == least]
            return {rank: f"rank {rank}: no answer within {seconds:.0f} s" for rank in behind}
    return {rank: f"rank {rank} {answers[rank].failure}" for rank in (first or failed)[:1]}


def bandwidths(answers: Mapping[int, Answer], ranks_per_node: int, nodes: int, named: Named) -> list[str]:
    """The lines on all-reduce bandwidth; none where there is but one rank."""
    inside, between = [0.0] * nodes, [0.0] * nodes
    for rank, answer in answers.items():
        inside[rank // ranks_per_node] += answer.inside / ranks_per_node / 1e9
        between[rank // ranks_per_node] += answer.between * 8 / 1e9
    lines = []
    for where, unit, values in (("inside", "GB/s per rank", inside), ("between", "Gbit/s per node", between)):
        if any(values):
            slowest = min(range(nodes), key=values.__getitem__)
            lines.append(
                f"all-reduce {where} the nodes: {sum(values) / nodes:.3g} {unit} "
                f"(slowest {named(slowest)} {values[slowest]:.3g})"
            )
    return lines


def failure_lines(failures: Collection[Failure], named: Named) -> list[str]:
    """One line per reason; nodes that share one share its line."""
    nodes: dict[str, list[int]] = {}
    for failure in sorted(failures, key=lambda failure: failure.node):
        nodes.setdefault(failure.reason, []).append(failure.node)
    return [f"preflight: {', '.join(map(named, who))}: {reason}" for reason, who in nodes.items()]


def table(reports: Mapping[int, Report], offsets: Mapping[int, float], nodes: int, named: Named) -> list[str]:
    """One line per node: what it has, free space, how far its clock is ahead of node 0's, samples."""
    rows = [["node", "host", "GPUs", "free: run_dir", "temp", "shm", "clock", "train", "val"]]
    for node in range(nodes):
        if node not in reports:
            rows.append([named(node), "no report", *[""] * 7])
            continue
        report = reports[node]
        free = [size(report.free[key]) if key in report.free else "?" for key in ("run_dir", "temp", "shm")]
        clock = f"{offsets[node]:+.2f} s" if node in offsets else "?"
        samples = [str(report.samples.get(key, "-")) for key in ("data.train", "data.val")]
        gpus = f"{report.gpu_text} (driver {report.driver})" if report.gpus and report.driver else report.gpu_text
        rows.append([named(node), report.host, gpus, *free, clock, *samples])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
