"""All of preflight in order: configuration, meeting, each node's checks, the comparison, the clocks, the all-reduce."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lte_scale.config import check_topology, check_training, load_config
from lte_scale.config.schema import Config
from lte_scale.engines.deepspeed import check_installed
from lte_scale.metrics import writers
from lte_scale.preflight.compare import (
    Failure,
    bandwidths,
    clock_offset,
    differences,
    failure_lines,
    own_failures,
    table,
)
from lte_scale.preflight.local import NodeCheck, Report, checkpoint_bytes, size, uses_gpus
from lte_scale.preflight.place import Place, Unreachable, first_line, from_environment, open_store, wait_for
from lte_scale.preflight.supervise import Ranks, answers_of_all
from lte_scale.topology import Topology

PASSED, REFUSED, FAILED = 0, 2, 3
_WHOLE_SECONDS = 50.0
"""After which no further all-reduce is waited for, so that every failure takes less than a minute."""

_LEAST_SECONDS = 8.0
_ANSWER_SECONDS = 5.0
"""For a node to answer on the clock, and to take note of the verdict."""

_REFUSAL_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be checked, as it was asked for."""

    config: Config
    place: Place
    topology: Topology
    checkpoint: int
    deadline: float
    began: float

    @property
    def patience(self) -> float:
        """Seconds for a node's own part: less than node 0 waits for it."""
        return 0.75 * self.deadline

    @property
    def gpu(self) -> bool:
        return uses_gpus(self.config, torch.cuda.device_count() if self.config.train.device != "cpu" else 0)

    def left(self) -> float:
        """Seconds for the all-reduce."""
        return min(self.patience, max(_LEAST_SECONDS, _WHOLE_SECONDS - (time.monotonic() - self.began)))


def run(arguments: argparse.Namespace) -> int:
    """As `lte_scale.preflight.run`."""
    began = time.monotonic()
    with ended_by_signals():
        try:
            request = _request(arguments, began)
        except ValueError as error:
            if os.environ.get("NODE_RANK", "0") in ("", "0"):  # all nodes read the same configuration
                raise
            _tell_refusal(error)
            return REFUSED
        check = NodeCheck(request.config, request.place, request.topology, request.checkpoint)
        code = _meet(request, check)
    if check.hangs:  # nor would the interpreter end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _request(arguments: argparse.Namespace, began: float) -> Request:
    if not arguments.deadline > 0:
        raise ValueError(f"--deadline: {arguments.deadline:g} seconds; use more than 0, or leave it out")
    config = load_config(arguments.config, arguments.overrides)
    place = from_environment(config.train.device)
    topology = Topology(
        nodes=place.nodes,
        ranks_per_node=place.ranks,
        heads_per_node=config.topology.heads_per_node or place.ranks,
        rank=place.node * place.ranks,
        nodes_per_region=config.topology.nodes_per_region,
    )
    check_training(config)
    check_topology(config, topology.nodes, topology.ranks_per_node)
    if config.engine.name == "deepspeed":
        check_installed()
    writers.check_installed(config.metrics)
    checkpoint = checkpoint_bytes(config, topology)
    return Request(config=config, place=place, topology=topology, checkpoint=checkpoint,
                   deadline=arguments.deadline, began=began)  # fmt: skip


def _tell_refusal(error: ValueError) -> None:
    """Of a node other than 0. Where node 0 is refused too it says so, and nobody hosts the store.

    This node waits for that, since a launcher may end all nodes as soon as one has failed.
    """
    try:
        place = from_environment("cpu")
        _follow(open_store(place, _REFUSAL_SECONDS), place, Report(failures=[first_line(error)]), None)
    except (ValueError, RuntimeError):
        pass


def _meet(request: Request, check: NodeCheck) -> int:
    place = request.place
    try:
        store = open_store(place, request.patience)
        until = time.monotonic() + request.deadline
        report = check.finish(request.patience)
        return _lead(store, request, report, until) if place.node == 0 else _follow(store, place, report, request)
    except RuntimeError as error:
        # Unreachable, or of a store that is gone with node 0: this node's last word.
        reason = first_line(error) if isinstance(error, Unreachable) else f"lost node 0 ({first_line(error)})"
        print(f"preflight: {place.name(place.node)}: {reason}", file=sys.stderr, flush=True)
        return FAILED


def _follow(store: TCPStore, place: Place, report: Report, request: Request | None) -> int:
    """What a node other than 0 does. Node 0 speaks for it."""
    never = float("inf")  # node 0 has deadlines for everything; if it is gone, the store raises
    store.set(f"report/{place.node}", report.to_json())
    wait_for(store, ["go"], never)
    store.set(f"clock/{place.node}", str(time.time()))
    wait_for(store, ["verdict"], never)
    verdict = store.get("verdict")
    if verdict == b"all-reduce" and request is not None:
        with Ranks(place, request.topology, gpu=request.gpu, seconds=request.left()) as ranks:
            while not store.check(["end"]):
                ranks.report_deaths(store)
                time.sleep(0.05)
        verdict = store.get("end")
    store.set(f"heard/{place.node}", "")
    return PASSED if verdict == b"passed" else FAILED


def _lead(store: TCPStore, request: Request, report: Report, until: float) -> int:
    """What node 0 does: it collects, compares and speaks."""
    place = request.place
    reports = {0: report}
    others = range(1, place.nodes)

    def take(key: str, value: bytes) -> None:
        reports[int(key.partition("/")[2])] = Report.from_json(value)

    wait_for(store, [f"report/{node}" for node in others], until, take)
    reports = dict(sorted(reports.items()))
    offsets, failures = _clocks(store, reports, place)
    missing = f"no report within {request.deadline:.0f} s; see whether the node is up and what it says"
    failures += [Failure(node, missing) for node in others if node not in reports]
    failures += own_failures(reports) + differences(reports, place.name)
    size_text = size(request.checkpoint)
    print(f"preflight: {place.nodes} nodes x {place.ranks} ranks; a checkpoint is about {size_text}")
    print("\n".join(table(reports, offsets, place.nodes, place.name)), flush=True)
    if failures or request.topology.world_size == 1:
        return _conclude(store, request, "verdict", failures, list(reports))
    seconds = request.left()
    store.set("verdict", "all-reduce")
    with Ranks(place, request.topology, gpu=request.gpu, seconds=seconds) as ranks:
        answers, reasons = answers_of_all(store, ranks, request.topology.world_size, seconds)
        if not reasons:
            print("\n".join(bandwidths(answers, place.ranks, place.nodes, place.name)), flush=True)
        failures = [Failure(rank // place.ranks, reason) for rank, reason in reasons.items()]
        return _conclude(store, request, "end", failures, list(reports))


def _clocks(store: TCPStore, reports: Mapping[int, Report], place: Place) -> tuple[dict[int, float], list[Failure]]:
    """How far each clock is ahead of node 0's, in seconds, and those that are too far."""
    offsets, failures = {0: 0.0}, list[Failure]()
    sent = time.time()
    store.set("go", "")

    def take(key: str, value: bytes) -> None:
        node = int(key.partition("/")[2])
        offsets[node], too_far = clock_offset(sent, float(value), time.time())
        if too_far:
            failures.append(
                Failure(
                    node, f"its clock is {offsets[node]:+.1f} s off {place.name(0)}'s; synchronise it (chrony, NTP)"
                )
            )

    keys = [f"clock/{node}" for node in reports if node]
    for key in wait_for(store, keys, time.monotonic() + _ANSWER_SECONDS, take):
        reason = f"reported, then did not answer within {_ANSWER_SECONDS:.0f} s; see whether it still runs"
        failures.append(Failure(int(key.partition("/")[2]), reason))
    return offsets, failures


def _conclude(store: TCPStore, request: Request, key: str, failures: list[Failure], nodes: list[int]) -> int:
    """Say the verdict, then tell it: a launcher may end node 0 when the first other node ends."""
    seconds = time.monotonic() - request.began
    if failures:
        print(f"preflight: failed after {seconds:.0f} s")
        print("\n".join(failure_lines(failures, request.place.name)), flush=True)
    else:
        print(f"preflight: passed in {seconds:.0f} s", flush=True)
    store.set(key, "failed" if failures else "passed")
    wait_for(store, [f"heard/{node}" for node in nodes if node], time.monotonic() + _ANSWER_SECONDS)
    return FAILED if failures else PASSED


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end this process by way of every `finally`, with the code that a shell gives them."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
