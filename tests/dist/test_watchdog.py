"""Planted hangs on 2 nodes x 2 ranks: named within the configured time, all ranks ended. And none where none is."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from lte_scale import log
from lte_scale.collectives import Collectives
from lte_scale.topology import Topology
from lte_scale.watchdog import EXIT_CODE, Watchdog
from tests.harness import free_port

SECONDS = 3.0
SLACK = 12.0
"""What a loaded machine may add."""


def merge_every_third(collectives: Collectives, step: int) -> None:
    """As a training step: within the node, and every third time across nodes."""
    collectives.all_reduce(torch.ones(1), collectives.node, "base")
    if step % 3 == 0:
        collectives.all_reduce(torch.ones(1), collectives.peers, "merge_dense")


def sleeps(rank: int, step: int) -> None:
    """Rank 3 does not come to the collective of step 4."""
    if rank == 3 and step == 4:
        time.sleep(600)  # planted


def slow(rank: int, step: int) -> None:
    """Steps that take nearly as long as they may."""
    time.sleep(0.8 * SECONDS if step > 1 else 0)


def quick(rank: int, step: int) -> None:
    time.sleep(0.02)


def slow_node(rank: int, step: int) -> None:
    """Node 1 works four times as long at a window as node 0 may wait for a step: two rounds of questions and more."""
    time.sleep((2.5 if step == 1 else 0.7) * SECONDS if rank > 1 else 0)


Plan = Callable[[int, int], None]


def train(rank: int, port: int, run_dir: Path, plan: Plan, steps: int, seconds: float) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    topology = Topology(nodes=2, ranks_per_node=2, heads_per_node=2, rank=rank)
    log.setup(rank, run_dir, node=topology.node)
    collectives = Collectives(topology, timeout_seconds=120)
    collectives.barrier()
    watchdog = Watchdog(collectives, run_dir, seconds)
    with closing(watchdog):
        for step in range(1, steps + 1):
            plan(rank, step)
            merge_every_third(collectives, step)
            watchdog.beat(step, "the next step")
            if step == 1:
                (run_dir / f"first{rank}").touch()
    collectives.barrier()  # the process with the store ends last
    if rank == 0:
        time.sleep(0.5)


@contextmanager
def running(
    run_dir: Path, plan: Plan, steps: int = 1_000_000, seconds: float = SECONDS
) -> Iterator[Sequence[BaseProcess]]:
    """Four ranks that have done a step."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.test_watchdog"])
    port = free_port()
    ranks = [context.Process(target=train, args=(r, port, run_dir, plan, steps, seconds)) for r in range(4)]
    try:
        for process in ranks:
            process.start()
        until = time.monotonic() + 90
        while len(list(run_dir.glob("first*"))) < 4:
            assert time.monotonic() < until and all(process.is_alive() for process in ranks), events(run_dir)
            time.sleep(0.02)
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def ended(ranks: Sequence[BaseProcess], within: float) -> list[int | None]:
    until = time.monotonic() + within
    for process in ranks:
        process.join(max(0.0, until - time.monotonic()))
    return [process.exitcode for process in ranks]


def events(run_dir: Path) -> list[str]:
    path = run_dir / "events.log"
    return path.read_text().splitlines() if path.exists() else []


def pause(ranks: Sequence[BaseProcess], number: int) -> None:
    for process in ranks:
        assert process.pid is not None
        os.kill(process.pid, number)


def test_a_rank_that_sleeps_before_a_collective(tmp_path: Path) -> None:
    with running(tmp_path, sleeps) as ranks:
        assert ended(ranks, SECONDS + SLACK) == [EXIT_CODE] * 4, events(tmp_path)
    (line,) = events(tmp_path)
    sleeping = 1 + next(i for i, text in enumerate(Path(__file__).read_text().splitlines()) if "# planted" in text)
    assert " error hang: no progress for 3 s after step 3; rank 3 (node 1, host " in line
    assert f"did not arrive at the base collective that rank 2 waits in; it is in test_watchdog.py:{sleeping} " in line
    assert line.endswith(f"stacks in {tmp_path / 'hangs'}; ending the run for a restart")
    stacks = {int(path.stem[-1]): path.read_text() for path in (tmp_path / "hangs").glob("step_*_rank?.txt")}
    assert sorted(stacks) == [0, 1, 2, 3]
    assert "time.sleep(600)" in stacks[3]
    assert "base, number 4 of ranks (2, 3); is inside" in stacks[2] and "all_reduce" in stacks[2]


@pytest.mark.parametrize("victim", [3, 0])
def test_a_rank_that_is_stopped(tmp_path: Path, victim: int) -> None:
    """Rank 0 has the job's store with it, so that the others cannot ask."""
    with running(tmp_path, quick) as ranks:
        pause([ranks[victim]], signal.SIGSTOP)
        others = [process for process in ranks if process is not ranks[victim]]
        assert ended(others, 3 * SECONDS + SLACK) == [EXIT_CODE] * 3, events(tmp_path)
        assert ranks[victim].is_alive()
    lines = events(tmp_path)
    assert all(" error hang: no progress for " in line for line in lines)
    if victim:
        (line,) = lines
        assert "rank 3 (node 1, host " in line and "says nothing while" in line
    else:
        assert len(lines) == 3 and all("the job's store does not answer" in line for line in lines)
        assert any("this rank (node 0, host " in line and "is in the base collective" in line for line in lines)
    assert len(list((tmp_path / "hangs").glob("step_*"))) == 3


def test_slow_steps_and_a_suspended_job_are_no_hang(tmp_path: Path) -> None:
    """Suspended for longer than a step may take, in the middle of one."""
    with running(tmp_path, slow, steps=3) as ranks:
        time.sleep(0.4 * SECONDS)
        pause(ranks, signal.SIGSTOP)
        time.sleep(1.5 * SECONDS)
        pause(ranks, signal.SIGCONT)
        assert ended(ranks, 6 * SECONDS + SLACK) == [0] * 4, events(tmp_path)
    assert events(tmp_path) == []
    assert not (tmp_path / "hangs").exists()


def test_a_slower_node_is_waited_for(tmp_path: Path) -> None:
    with running(tmp_path, slow_node, steps=3) as ranks:
        assert ended(ranks, 6 * SECONDS + SLACK) == [0] * 4, events(tmp_path)
    assert any("waits for rank" in line and "at work" in line for line in events(tmp_path))
    assert not any(" error " in line for line in events(tmp_path))
