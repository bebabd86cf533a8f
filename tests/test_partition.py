"""The link between two nodes is cut under a run and healed: the run only waits, or it ends, says who is cut off, and
resumes. Either way with the weights, in the end, of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import ROOT, Nodes, lacking
from tests.test_slow_node import TWO_NODES, WORDS
from tests.test_train import assert_same_end, command, records, wait_for_step

CUT_SECONDS, PATIENCE_SECONDS = 5.0, 15.0

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(bool(lacking(["ip", "tc", "unshare"])), reason="needs root and iproute2"),
]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([*TWO_NODES, *command(digits, run_dir, *WORDS)], check=True, capture_output=True)
    return run_dir


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(2)
    with nodes.network:
        yield nodes
        nodes.kill()


def start(nodes: Nodes, words: list[str]) -> list[subprocess.Popen[str]]:
    """The command on both nodes, as by hand: nothing but the network is between them."""
    common = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "node0", "GLOO_SOCKET_IFNAME": "eth0"}
    common |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = str(ROOT / "launchers" / "torchrun.sh")
    return [nodes.start(node, [script, *words], {**common, "NODE_RANK": str(node)}) for node in (0, 1)]


def finish(jobs: list[subprocess.Popen[str]]) -> str:
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(outputs)
    return "\n".join(outputs)


def test_a_cut_that_heals_in_time_is_only_waited_for(digits: Path, whole: Path, tmp_path: Path, nodes: Nodes) -> None:
    """TCP sends again what was lost; nothing is restarted."""
    run_dir = tmp_path / "cut"
    jobs = start(nodes, command(digits, run_dir, *WORDS))
    wait_for_step(jobs[0], run_dir, 13)
    nodes.cut(1)
    time.sleep(CUT_SECONDS)
    stood = int(records(run_dir)[-1]["step"])
    nodes.heal(1)
    healed = time.monotonic()
    wait_for_step(jobs[0], run_dir, stood + 4)
    print(f"\ncut for {CUT_SECONDS:g} s at step {stood}, at work {time.monotonic() - healed:.1f} s after it was healed")
    said = finish(jobs)
    assert "resumed from" not in said and "hang" not in said
    assert_same_end(run_dir, whole)


def test_a_cut_that_lasts_ends_both_sides_and_the_run_resumes(
    digits: Path, whole: Path, tmp_path: Path, nodes: Nodes
) -> None:
    run_dir = tmp_path / "cut"
    # At once: there is a checkpoint to resume from at the moment of the cut, however fast the steps are.
    words = command(digits, run_dir, *WORDS, "checkpoint.asynchronous=false", f"watchdog.seconds={PATIENCE_SECONDS:g}")
    jobs = start(nodes, words)
    wait_for_step(jobs[0], run_dir, 13)
    nodes.cut(1)
    began = time.monotonic()
    for job in jobs:
        job.communicate(timeout=10 * PATIENCE_SECONDS)
    print(f"\ncut: both sides had ended after {time.monotonic() - began:.1f} s, watchdog.seconds={PATIENCE_SECONDS:g}")
    assert all(job.returncode for job in jobs)
    assert not nodes.wait_until_empty(30)
    hangs = [line for line in (run_dir / "events.log").read_text().splitlines() if " hang: no progress" in line]
    by_rank = {line.split()[2]: line for line in hangs}
    assert "rank 1 (node 1, host node1) says nothing while rank 0 waits in the merge" in by_rank["0"]
    assert "or the node is cut off" in by_rank["0"]
    assert "the job's store does not answer, as when the node of rank 0 is lost" in by_rank["1"]
    assert "this rank (node 1, host node1) is in the merge" in by_rank["1"]
    reached = int(records(run_dir)[-1]["step"])
    nodes.heal(1)
    again = time.monotonic()
    jobs = start(nodes, words)
    wait_for_step(jobs[0], run_dir, reached + 1)
    print(f"healed and started again: at a new step after {time.monotonic() - again:.1f} s")
    assert "resumed from" in finish(jobs)
    assert_same_end(run_dir, whole)
