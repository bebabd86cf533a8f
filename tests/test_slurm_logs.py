"""What a job's log keeps of what 64 ranks say, and which error it names: slurm/lib.sh on logs as they come."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = """==== attempt 0, train, 2026-11-25T06:00:00
[rank2]: Traceback (most recent call last):
============================================================
-m FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_06:01:46
  host      : node1
  rank      : 3 (local_rank: 1)
  exitcode  : {other} (pid: 24455)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_06:01:45
  host      : node1
  rank      : 2 (local_rank: 0)
  exitcode  : {root} (pid: 24452)
  error_file: <N/A>
"""
CONNECTION = (
    "2026-11-25T06:00:0{second}.000+00:00 rank {rank} error on node0: RuntimeError: Connection closed by peer\n"
)
CAUSE = "2026-11-25T06:00:05.000+00:00 rank 5 error on node1: OutOfMemoryError: CUDA out of memory\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of job 7's logs, in the run directory tmp_path."""
    folder = tmp_path / "slurm" / "7"
    folder.mkdir(parents=True)
    return folder


def bash(job: Path, command: str, given: str = "", events_before: int = 0) -> str:
    settings = f"LTE_HOME={ROOT} RUN_DIR={job.parents[1]} state={job.parent} SLURM_JOB_ID=7 STOP_MARK={job}/stopped"
    script = f". {ROOT}/slurm/lib.sh; {settings} nodes=(node0 node1); events_before={events_before}; {command}"
    done = subprocess.run(["bash", "-c", script], input=given, capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(("root", "other"), [("-9", "1"), ("1", "-9"), ("-9", "-15")])
def test_a_killed_rank_is_the_first_error(job: Path, root: str, other: str) -> None:
    (job / "node1.log").write_text(TABLE.format(root=root, other=other))
    (job.parents[1] / "events.log").write_text(CONNECTION.format(second=1, rank=0))
    assert bash(job, "first_error") == f"node1: rank {2 if root == '-9' else 3} was killed by signal 9"


def test_ranks_that_were_ended_by_their_launcher_are_not(job: Path) -> None:
    (job / "node1.log").write_text(TABLE.format(root="1", other="-15"))
    (job.parents[1] / "events.log").write_text(CONNECTION.format(second=1, rank=0) + CAUSE)
    assert bash(job, "first_error") == "rank 5 error on node1: OutOfMemoryError: CUDA out of memory"


def test_a_rank_of_deepspeed_that_was_killed(job: Path) -> None:
    line = "[2026-11-25 06:00:00,000] [ERROR] [launch.py:325] ['python', 'train.py'] exits with return code = -9"
    (job / "node0.log").write_text(f"==== attempt 0, train\n{line}\n")
    assert bash(job, "first_error") == "node0: a rank was killed by signal 9"


def test_of_errors_the_first_that_is_not_about_another_rank(job: Path) -> None:
    events = job.parents[1] / "events.log"
    events.write_text(CONNECTION.format(second=2, rank=3) + CAUSE + CONNECTION.format(second=1, rank=2))
    assert bash(job, "first_error").endswith("OutOfMemoryError: CUDA out of memory")
    events.write_text(CONNECTION.format(second=2, rank=3) + CONNECTION.format(second=1, rank=2))
    assert bash(job, "first_error") == "rank 2 error on node0: RuntimeError: Connection closed by peer"


def test_errors_of_earlier_steps_are_over(job: Path) -> None:
    (job.parents[1] / "events.log").write_text(CAUSE)
    (job / "node0.log").write_text(
        f"{TABLE.format(root='-9', other='1')}==== attempt 1, train\nlte-scale: run_dir: full\n"
    )
    assert bash(job, "first_error", events_before=len(CAUSE)) == "node0: lte-scale: run_dir: full"


def test_a_node_that_was_told_to_stop(job: Path) -> None:
    (job / "node1.log").write_text(TABLE.format(root="-15", other="143"))
    (job / "stopped").write_text("node1\n")
    assert bash(job, "first_error") == "node1: told to stop (SIGTERM), though the job was not"


def test_nothing_was_said(job: Path) -> None:
    assert bash(job, "first_error") == "no rank has said why"


def test_the_job_keeps_what_is_for_people_and_nodes_keep_all(job: Path) -> None:
    wanted = [
        "step 10/96  epoch 0.2  loss 2.3",
        "[node 1 rank 3] warning: skipped damaged a.tar",
        "resumed from step_00000020",
    ]
    noise = [
        "Traceback (most recent call last):", '  File "train.py", line 3', "[rank3]: ValueError: no",
        "RuntimeError: gone",
        "W1125 06:01:46.000000 24349 torch/distributed/run.py:1] x", "[W1125 06:01:46.0 socket.cpp:1] y", "=" * 60, "",
        "Root Cause (first observed failure):", "frame #3: <unknown function>",
    ]  # fmt: skip
    labelled = [f"0: {wanted[0]}", f"1: {wanted[1]}", f" 0: {wanted[2]}", *(f"1: {line}" for line in noise)]
    srun = ["srun: error: Node failure on node1", "srun: error: node1: task 1: Exited with exit code 1"]
    said = bash(job, "split_logs", given="\n".join([*labelled, *srun]) + "\n").splitlines()
    assert said == [*wanted, srun[0]]
    assert (job / "node0.log").read_text().splitlines() == [wanted[0], wanted[2]]
    assert (job / "node1.log").read_text().splitlines() == [wanted[1], *noise]


@pytest.mark.parametrize("script", ["vit_l_64gpu", "vit_s_8gpu", "sweep_array"])
def test_scripts_say_what_they_need(script: str, tmp_path: Path) -> None:
    path = str(ROOT / "slurm" / f"{script}.sh")
    done = subprocess.run(
        ["bash", path],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr == f"slurm: {tmp_path} is not the repository: submit from there, or set LTE_HOME\n"
