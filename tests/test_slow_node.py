"""A node slowed to a fifth of its speed: the others wait for it, no watchdog takes that for a hang, and it is named."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lte_scale.cli import main
from tests.kills import emulated
from tests.test_train import EMULATE, SMALL, assert_same_end, command, records, wait_for_step

TWO_NODES = [*EMULATE[:2], "--nodes", "2", "--ranks-per-node", "1", "--"]
WORDS = [*SMALL, "merge={every: 4, local_every: 4}", "train.duration=80", "data.workers=0", "checkpoint.every=10"]
RUNS_SECONDS, STOPS_SECONDS = 0.1, 0.4


def rank_of(job: subprocess.Popen[str], rank: int) -> int:
    """Process id of a rank of an emulation."""
    return next(pid for pid, entries in emulated(job.pid).items() if f"RANK={rank}".encode() in entries)


@pytest.mark.faults
def test_a_node_slowed_to_a_fifth(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "slowed"
    subprocess.run([*TWO_NODES, *command(digits, whole, *WORDS)], check=True, capture_output=True)
    words = [*command(digits, run_dir, *WORDS, "watchdog.seconds=20")[:-1], "metrics.port=19890"]
    job = subprocess.Popen([*TWO_NODES, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(job, run_dir, 1)
    slowed, shown = rank_of(job, 1), ""
    began, pauses = time.monotonic(), 0
    while (step := records(run_dir)[-1]["step"]) < 80 and job.poll() is None:
        os.kill(slowed, signal.SIGSTOP)
        time.sleep(STOPS_SECONDS)
        os.kill(slowed, signal.SIGCONT)
        time.sleep(RUNS_SECONDS)
        pauses += 1
        if not shown and step >= 40:
            assert main(["top", str(run_dir), "--once"]) == 0
            shown = capsys.readouterr().out
    stopped = pauses * STOPS_SECONDS / (time.monotonic() - began)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert stopped > 0.6, "it was hardly slowed"
    assert "hang" not in output and "no progress" not in output and "resumed from" not in output
    named = next(line for line in shown.splitlines() if line.startswith("* node 1 is the slowest: "))
    with capsys.disabled():
        print(f"\nstopped for {100 * stopped:.0f} % of the time; top: {named}")
    assert_same_end(run_dir, whole)
