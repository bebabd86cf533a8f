"""From what every rank reports to who did not arrive: plain logic, no clock, no network.

A rank waits for those that have entered fewer collectives of a group than it has itself. Who is waited for and waits
for nobody is the cause; all others wait for it, often in turn: a rank late in its node makes its node late at the
global merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lte_scale.collectives import Call
from lte_scale.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank says of itself.

    Attributes:
        step: its last whole step.
        doing: what the trainer said it would do next.
        silent: whether it has made no progress for about as long as it may.
        where: the line of the project that its main thread executes.
        in_torch: whether one of its threads is inside torch.distributed.
        asynchronous: whether its collectives may return before they are done (CUDA).
        call, inside, entered: as `last`, `inside` and `entered` of Collectives.
    """

    rank: int
    host: str = ""
    step: int = 0
    doing: str = ""
    silent: bool = True
    where: str = ""
    in_torch: bool = False
    asynchronous: bool = False
    call: Call | None = None
    inside: bool = False
    entered: Mapping[tuple[int, ...], int] = field(default_factory=dict)


Kind = Literal["absent", "arrived", "circle", "stuck", "slow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why silent ranks are silent.

    absent: `ranks` did not come to `call`, where `waiting` are.
    arrived: `ranks` all came to `call`, and it does not end.
    circle: `ranks` wait for one another, each in another collective.
    stuck: `ranks` make no progress, and no other is known to wait for them.
    slow: the others wait for `ranks`, which are at work: no hang.
    """

    kind: Kind
    ranks: tuple[int, ...]
    call: Call | None = None
    waiting: tuple[int, ...] = ()


def judge(reports: Mapping[int, Report], world: int) -> Verdict:
    """The cause of a silence, by the reports of those that answered; at least one is silent."""
    silent = {rank for rank, report in reports.items() if report.silent}
    waits_for = {rank: _waited_for(reports[rank], reports) for rank in silent}
    late = set[int]().union(*waits_for.values())
    causes = {rank for rank in late | silent if not waits_for.get(rank)}
    if not causes:
        return Verdict(kind="circle", ranks=tuple(sorted(late & silent)))
    at_work = {rank for rank in causes if rank in reports and not reports[rank].silent}
    causes -= at_work
    if not causes:
        return Verdict(kind="slow", ranks=tuple(sorted(at_work)))
    if absent := causes & late:
        return _absent(absent, waits_for, reports)
    alone = [reports[rank] for rank in sorted(causes)]
    for report in alone:
        if report.call and (report.inside or (report.asynchronous and set(report.call.ranks) <= silent)):
            return Verdict(kind="arrived", ranks=report.call.ranks, call=report.call)
    # No collective of ours: PyTorch's own of a checkpoint, for example, which are not counted.
    waiting = tuple(report.rank for report in alone if report.in_torch)
    others = {report.rank for report in alone if not report.in_torch} or set(range(world)) - set(reports)
    if waiting and others:
        return Verdict(kind="absent", ranks=tuple(sorted(others)), waiting=waiting)
    return Verdict(kind="stuck", ranks=tuple(report.rank for report in alone))


def _waited_for(mine: Report, reports: Mapping[int, Report]) -> set[int]:
    found = {
        other
        for ranks, number in mine.entered.items()
        for other in ranks
        if other in reports and reports[other].entered.get(ranks, 0) < number
    }
    if mine.call and (mine.inside or mine.asynchronous):
        found |= set(mine.call.ranks) - set(reports)
    return found


def _absent(absent: set[int], waits_for: Mapping[int, set[int]], reports: Mapping[int, Report]) -> Verdict:
    waiting = tuple(sorted(rank for rank, others in waits_for.items() if others & absent))
    calls = {rank: call for rank in waiting if (call := reports[rank].call) and absent & set(call.ranks)}
    call = None
    if calls:  # others may wait in wider groups for what holds up the nearest ones
        call = min(calls.values(), key=lambda call: (max(call.ranks) - min(call.ranks), call.ranks))
        waiting = tuple(rank for rank, other in calls.items() if other.purpose == call.purpose)
    return Verdict(kind="absent", ranks=tuple(sorted(absent)), call=call, waiting=waiting)


def sentence(verdict: Verdict, reports: Mapping[int, Report], topology: Topology, hosts: Mapping[int, str]) -> str:
    """The verdict in plain words. `hosts` by rank, also of those without a report."""
    if verdict.kind == "absent":
        return _say_absent(verdict, reports, topology, hosts)
    who = _places(verdict.ranks, topology, hosts)
    if verdict.kind == "arrived":
        assert verdict.call is not None
        nodes = sorted({rank // topology.ranks_per_node for rank in verdict.call.ranks})
        link = f"the network between nodes {spans(nodes)}" if len(nodes) > 1 else f"the links inside node {nodes[0]}"
        return f"all arrived at {_name(verdict.call)} of {who}, and it does not end: see {link}"
    if verdict.kind == "circle":
        calls = [(rank, reports[rank].call) for rank in verdict.ranks]
        each = ", ".join(f"rank {rank} in {_name(call)} of ranks {spans(call.ranks)}" for rank, call in calls if call)
        return f"{who} wait for one another: {each}"
    if verdict.kind == "slow":
        return f"waits for {who}, {'which is' if len(verdict.ranks) == 1 else 'which are'} at work"
    makes = "makes" if len(verdict.ranks) == 1 else "make"
    return f"{who} {makes} no progress, and no other is known to wait for that: {_wheres(verdict.ranks, reports)}"


def _say_absent(verdict: Verdict, reports: Mapping[int, Report], topology: Topology, hosts: Mapping[int, str]) -> str:
    answered = [rank for rank in verdict.ranks if rank in reports]
    mute = [rank for rank in verdict.ranks if rank not in reports]
    waiting = f"{_ranks(verdict.waiting)} {'waits' if len(verdict.waiting) == 1 else 'wait'}"
    parts = []
    if answered:
        at = f"at {_name(verdict.call)} that {waiting} in" if verdict.call else f"where {waiting}"
        parts.append(f"{_places(answered, topology, hosts)} did not arrive {at}; {_wheres(answered, reports)}")
    if mute:
        says, its = ("says", "its process is") if len(mute) == 1 else ("say", "their processes are")
        parts.append(
            f"{_places(mute, topology, hosts)} {says} nothing while {waiting}"
            f"{f' in {_name(verdict.call)}' if verdict.call else ''}: {its} stopped or gone, or the node is cut off"
        )
    return "; ".join(parts)


def _wheres(ranks: Iterable[int], reports: Mapping[int, Report]) -> str:
    by_place: dict[str, list[int]] = {}
    for rank in ranks:
        report = reports[rank]
        by_place.setdefault(f"{report.where}{f' ({report.doing})' if report.doing else ''}", []).append(rank)
    if len(by_place) == 1:
        place, found = by_place.popitem()
        return f"{'it is' if len(found) == 1 else 'they are'} in {place}"
    return ", ".join(f"{_ranks(found)} in {place}" for place, found in by_place.items())


def _name(call: Call) -> str:
    return f"the {call.purpose} collective"


def _places(ranks: Iterable[int], topology: Topology, hosts: Mapping[int, str]) -> str:
    """`rank 3 (node 1, host gpu-07)`, for each node."""
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(rank // topology.ranks_per_node, []).append(rank)
    said = []
    for node, found in sorted(by_node.items()):
        host = next((f", host {hosts[rank]}" for rank in found if hosts.get(rank)), "")
        said.append(f"{_ranks(found)} (node {node}{host})")
    return " and ".join(said)


def _ranks(ranks: Iterable[int]) -> str:
    found = list(ranks)
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {spans(found)}"


def spans(numbers: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
