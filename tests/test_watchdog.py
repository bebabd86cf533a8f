"""Who did not arrive: the verdict over reports, without processes. Real hangs are in tests/dist/test_watchdog.py."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lte_scale.collectives import Call, Collectives
from lte_scale.topology import Topology
from lte_scale.watchdog import EXIT_CODE, Watchdog
from lte_scale.watchdog.stacks import where
from lte_scale.watchdog.verdict import Report, Verdict, judge, sentence, spans

WORLD, NODES = (0, 1, 2, 3), ((0, 1), (2, 3))
PEERS = ((0, 2), (1, 3))
TOPOLOGY = Topology(nodes=2, ranks_per_node=2, heads_per_node=2)
HOSTS = {rank: f"gpu-0{rank // 2}" for rank in range(4)}

Entered = Mapping[tuple[int, ...], int]


def inside(rank: int, purpose: str, ranks: tuple[int, ...], entered: Entered, *, silent: bool = True) -> Report:
    call = Call(purpose, ranks, entered[ranks])
    return Report(rank=rank, call=call, inside=True, entered=entered, silent=silent, in_torch=True)


def outside(rank: int, entered: Entered, *, silent: bool = True, where: str = "trainer.py:140 next_batch") -> Report:
    return Report(rank=rank, entered=entered, silent=silent, where=where)


def by_rank(*reports: Report) -> dict[int, Report]:
    return {report.rank: report for report in reports}


def said(verdict: Verdict, reports: Mapping[int, Report]) -> str:
    return sentence(verdict, reports, TOPOLOGY, HOSTS)


def test_one_that_sleeps_is_named_with_node_host_and_line() -> None:
    reports = by_rank(*(inside(rank, "merge_dense", WORLD, {WORLD: 7}) for rank in range(3)), outside(3, {WORLD: 6}))
    verdict = judge(reports, 4)
    assert verdict == Verdict(kind="absent", ranks=(3,), call=Call("merge_dense", WORLD, 7), waiting=(0, 1, 2))
    assert said(verdict, reports) == (
        "rank 3 (node 1, host gpu-01) did not arrive at the merge_dense collective that ranks 0-2 wait in; "
        "it is in trainer.py:140 next_batch"
    )


def test_one_that_never_came_to_the_group_at_all() -> None:
    reports = by_rank(inside(0, "base", (0, 1), {(0, 1): 1}), outside(1, {}))
    assert judge(reports, 2).ranks == (1,)


def test_one_that_says_nothing() -> None:
    reports = by_rank(
        inside(0, "base", NODES[0], {NODES[0]: 9}),
        outside(2, {NODES[1]: 20}, silent=False),
        outside(3, {NODES[1]: 20}, silent=False),
    )
    verdict = judge(reports, 4)
    assert verdict == Verdict(kind="absent", ranks=(1,), call=Call("base", NODES[0], 9), waiting=(0,))
    assert said(verdict, reports) == (
        "rank 1 (node 0, host gpu-00) says nothing while rank 0 waits in the base collective: "
        "its process is stopped or gone, or the node is cut off"
    )


def test_a_node_that_says_nothing() -> None:
    reports = by_rank(*(inside(rank, "merge_factor", PEERS[rank], {PEERS[rank]: 3}) for rank in (0, 1)))
    verdict = judge(reports, 4)
    assert (verdict.kind, verdict.ranks, verdict.waiting) == ("absent", (2, 3), (0, 1))
    assert said(verdict, reports).startswith("ranks 2-3 (node 1, host gpu-01) say nothing while ranks 0-1 wait in")


def test_a_chain_is_followed_to_its_end() -> None:
    """Rank 3 is late in its node, so that node 1 is late at the global merge, so that node 0 waits."""
    reports = by_rank(
        inside(0, "merge_dense", PEERS[0], {PEERS[0]: 5, NODES[0]: 40}),
        inside(1, "merge_dense", PEERS[1], {PEERS[1]: 5, NODES[0]: 40}),
        inside(2, "control", NODES[1], {PEERS[0]: 4, NODES[1]: 38}),
        outside(3, {PEERS[1]: 4, NODES[1]: 37}),
    )
    verdict = judge(reports, 4)
    assert verdict == Verdict(kind="absent", ranks=(3,), call=Call("control", NODES[1], 38), waiting=(2,))


def test_all_arrived_and_the_network_is_stuck() -> None:
    reports = by_rank(*(inside(rank, "merge_dense", PEERS[rank % 2], {PEERS[rank % 2]: 5}) for rank in range(4)))
    verdict = judge(reports, 4)
    assert (verdict.kind, verdict.call) == ("arrived", Call("merge_dense", PEERS[0], 5))
    assert said(verdict, reports) == (
        "all arrived at the merge_dense collective of rank 0 (node 0, host gpu-00) and rank 2 (node 1, host gpu-01), "
        "and it does not end: see the network between nodes 0-1"
    )
    reports = by_rank(*(inside(rank, "base", NODES[1], {NODES[1]: 5}) for rank in NODES[1]))
    assert said(judge(reports, 4), reports).endswith("see the links inside node 1")


def test_who_is_at_work_is_waited_for() -> None:
    """A slower node: the others have waited long, and it trains on."""
    reports = by_rank(
        *(inside(rank, "merge_dense", PEERS[rank], {PEERS[rank]: 5, NODES[0]: 50}) for rank in NODES[0]),
        inside(2, "base", NODES[1], {PEERS[0]: 4, NODES[1]: 33}, silent=False),
        outside(3, {PEERS[1]: 4, NODES[1]: 32}, silent=False),
    )
    verdict = judge(reports, 4)
    assert (verdict.kind, verdict.ranks) == ("slow", (2, 3))
    assert said(verdict, reports) == "waits for ranks 2-3 (node 1, host gpu-01), which are at work"


def test_a_hang_in_one_node_is_found_though_the_other_trains() -> None:
    reports = by_rank(
        inside(0, "base", NODES[0], {NODES[0]: 12}),
        outside(1, {NODES[0]: 11}),
        outside(2, {NODES[1]: 90}, silent=False),
        inside(3, "base", NODES[1], {NODES[1]: 91}, silent=False),
    )
    assert judge(reports, 4).ranks == (1,)


def test_ranks_that_wait_for_one_another() -> None:
    reports = by_rank(
        inside(0, "merge_dense", PEERS[0], {PEERS[0]: 1}),
        inside(1, "control", NODES[0], {NODES[0]: 1, PEERS[1]: 0}),
        inside(2, "control", NODES[1], {NODES[1]: 1}),
        inside(3, "merge_dense", PEERS[1], {PEERS[1]: 1}),
    )
    verdict = judge(reports, 4)
    assert verdict.kind == "circle"
    assert "wait for one another: rank 0 in the merge_dense collective of ranks 0, 2, rank 1 in" in said(
        verdict, reports
    )


def test_collectives_that_are_not_counted() -> None:
    """Those of a save are PyTorch's own: who is in torch.distributed waits, who is not has not arrived."""
    waits = [Report(rank=rank, entered={WORLD: 3}, in_torch=True, where="checkpoint.py:1 save") for rank in (0, 1, 2)]
    reports = by_rank(*waits, outside(3, {WORLD: 3}, where="storage.py:9 write"))
    verdict = judge(reports, 4)
    assert verdict == Verdict(kind="absent", ranks=(3,), waiting=(0, 1, 2))
    assert "did not arrive where ranks 0-2 wait; it is in storage.py:9 write" in said(verdict, reports)
    assert judge(by_rank(*waits), 4) == Verdict(kind="absent", ranks=(3,), waiting=(0, 1, 2))


def test_cuda_collectives_return_before_they_are_done() -> None:
    call = Call("base", NODES[0], 8)
    reports = by_rank(
        *(Report(rank=rank, asynchronous=True, call=call, entered={NODES[0]: 8}) for rank in NODES[0]),
        *(Report(rank=rank, asynchronous=True, silent=False, entered={NODES[1]: 30}) for rank in NODES[1]),
    )
    assert judge(reports, 4).kind == "arrived"
    del reports[1]
    assert judge(reports, 4) == Verdict(kind="absent", ranks=(1,), call=call, waiting=(0,))


def test_alone() -> None:
    reports = by_rank(outside(0, {}))
    verdict = judge(reports, 1)
    assert said(verdict, reports) == (
        "rank 0 (node 0, host gpu-00) makes no progress, and no other is known to wait for that: "
        "it is in trainer.py:140 next_batch"
    )


def test_spans() -> None:
    assert spans([5, 0, 1, 2]) == "0-2, 5"


def test_the_line_is_the_projects_own() -> None:
    def later() -> str:
        time.sleep(0.2)
        return where()

    with ThreadPoolExecutor(1) as executor:
        said = executor.submit(later).result()
    assert said.startswith("test_watchdog.py:")
    assert " test_the_line_is_the_projects_own, there in threading.py:" in said


def test_off_and_closed_it_has_no_threads(tmp_path: Path) -> None:
    collectives = Collectives(Topology())
    off = Watchdog(collectives, tmp_path, 0)
    off.beat(1)
    off.close()
    watchdog = Watchdog(collectives, tmp_path, 0.4)
    watchdog.close()
    time.sleep(2)
    assert not list(tmp_path.iterdir())


def test_a_beat_costs_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(Collectives(Topology()), tmp_path, 60)
    began = time.perf_counter()
    for step in range(100_000):
        watchdog.beat(step, "the next step")
    each = (time.perf_counter() - began) / 100_000
    watchdog.close()
    assert each < 20e-6


def test_a_beat_ends_the_silence_before_it_at_once(tmp_path: Path) -> None:
    """Not only at the next tick: a first step, or a save, may take longer than the step after it."""
    watchdog = Watchdog(Collectives(Topology()), tmp_path, seconds=60)
    watchdog.close()  # so that no tick comes in between
    first, _ = watchdog._counted
    watchdog._counted = (first, 200.0)  # of the 240 that the first step has
    assert not watchdog._report().silent and watchdog._remaining == 40
    watchdog._counted = (first, 230.0)
    assert watchdog._report().silent
    watchdog.beat(1)
    assert not watchdog._report().silent and watchdog._silence == 0


ALONE = """
import sys, time
from pathlib import Path
from lte_scale import log
from lte_scale.collectives import Collectives
from lte_scale.topology import Topology
from lte_scale.watchdog import Watchdog

run_dir = Path(sys.argv[1])
log.setup(0, run_dir)
watchdog = Watchdog(Collectives(Topology()), run_dir, 1)
watchdog.beat(12, "the next batch")
time.sleep(60)
"""


def test_a_single_process_ends_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_CODE, done.stderr
    (line,) = (tmp_path / "events.log").read_text().splitlines()
    assert " rank 0 error hang: no progress for 1 s after step 12; rank 0 (node 0" in line
    assert "it is in <string>:13 <module> (the next batch); stacks in " in line
    assert "thread MainThread" in (tmp_path / "hangs" / "step_00000012_rank0.txt").read_text()
