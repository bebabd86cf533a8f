"""slurm/vit_l_64gpu.sh on a real Slurm of two nodes: preempted, cancelled, killed; resumed as if nothing was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lte_scale.cli import main
from lte_scale.run_dir import whole_checkpoints
from tests.nodes import ROOT
from tests.slurm_cluster import ENDED, SlurmCluster, missing
from tests.test_train import EMULATE, SMALL, assert_same_end, command, finish, records, tensors

SCRIPT = str(ROOT / "slurm" / "vit_l_64gpu.sh")
TRAIN = [
    *SMALL,
    "merge={every: 8, local_every: 4}",
    "train.duration=96",
    "checkpoint.every=12",
    "data.workers=1",
    "metrics.port=0",
]
SIZES = ["--nodes=2", "--gpus-per-node=2", "--mem=2000", "--time=30"]
AT_SAVES = "intra_node_bytes"  # a save gathers the base once more inside the node, and a stop saves
LACKS = missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(LACKS), reason=f"needs {LACKS}"),
]


@pytest.fixture(scope="module")
def machines() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=2, gpus=2) as cluster:
        yield cluster
    assert [name for name in cluster.network.namespaces if (Path("/run/netns") / name).exists()] == []


@pytest.fixture
def cluster(machines: SlurmCluster) -> Iterator[SlurmCluster]:
    """Nodes that are up and idle."""
    machines.wait_for_nodes()
    yield machines
    machines.start_lost_nodes()
    for number in machines.run("squeue", "-h", "-o", "%i").split():  # what a test that failed left
        machines.run("scancel", "--signal=KILL", "--full", number, check=False)
        machines.run("scancel", number, check=False)
    machines.kill("lte_scale")


class Job:
    """A job of `script` in a folder of its own, which holds its log and its run."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path, *words: str, script: str = SCRIPT, **env: str):
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / "run"
        environ = {
            "CONFIG": str(ROOT / "configs" / "demo.yaml"),
            "DATA": str(data),
            "RUN_DIR": str(self.run_dir),
            "LTE_HOME": str(ROOT),
            "VENV": str(Path(sys.executable).parent.parent),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        options = [word for word in words if word.startswith("-")]
        overrides = [word for word in words if not word.startswith("-")]
        self.number = cluster.submit(folder, *SIZES, *options, script, *overrides, environ=environ)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def node_log(self, node: str) -> str:
        return (self.run_dir / "slurm" / str(self.number) / f"{node}.log").read_text()

    def wait(self, reached: Callable[[], bool], what: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not reached():
            state = self.cluster.job(self.number)["JobState"]
            assert state not in ENDED or reached(), f"{state}, not {what}:\n{self.log}"
            assert time.monotonic() < until, f"not {what} after {seconds} s:\n{self.log}"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: any(r["step"] >= step for r in records(self.run_dir)), f"at step {step}")

    def wait_for_attempt(self, attempt: int) -> None:
        self.wait(lambda: f"slurm: attempt {attempt}, " in self.log, f"in attempt {attempt}")

    def end(self, state: str, seconds: float = 180) -> list[str]:
        """The job ends in this state; the lines of its log."""
        ended = self.cluster.wait_for_end(self.number, seconds)
        assert ended == state, self.log
        assert self.cluster.wait_until_empty(30) == {}
        return self.log.splitlines()

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, on emulated nodes."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    job = [*EMULATE, *command(digits, run_dir, *TRAIN)]
    finish(subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return run_dir


def test_time_limit_preemption_and_requeues_in_a_row(
    cluster: SlurmCluster, digits: Path, whole: Path, tmp_path: Path
) -> None:
    """USR1 by the time limit, by a job of a higher partition, by hand: three requeues, one run."""
    job = Job(cluster, tmp_path, digits, *TRAIN, "train.duration=100000", "--time=1", "--signal=B:USR1@5")
    job.wait_for_attempt(1)
    steps = len(records(job.run_dir))
    cluster.run("scancel", str(job.number))
    job.end("CANCELLED")
    assert "slurm: USR1: the time is nearly over" in job.log
    assert "stopped by USR1" in job.log
    assert steps > 0
    assert [r["step"] for r in records(job.run_dir)] == list(range(1, len(records(job.run_dir)) + 1))


def test_requeued_runs_end_as_uninterrupted_ones(
    cluster: SlurmCluster, digits: Path, whole: Path, tmp_path: Path
) -> None:
    """Preempted by a job of a higher partition, then USR1 by hand, twice; by exit code."""
    job = Job(cluster, tmp_path, digits, *TRAIN)
    job.wait_for_step(14)
    urgent = cluster.submit(tmp_path, "-p", "urgent", *SIZES, "--output=/dev/null", "--wrap", "sleep 1")
    job.wait_for_attempt(1)
    assert cluster.wait_for_end(urgent, 30) == "COMPLETED"
    for attempt in (1, 2):
        job.wait_for_step(len(records(job.run_dir)) + 9)
        cluster.run("scancel", "-b", "--signal=USR1", str(job.number))
        job.wait_for_attempt(attempt + 1)
    lines = job.end("COMPLETED")
    assert job.restarts == 3
    assert lines[-1] == "slurm: the run is whole"
    assert len([line for line in lines if line.startswith("preflight: passed")]) == 4
    assert any(line.startswith("all-reduce between the nodes: ") for line in lines)
    for node in cluster.names:
        assert job.node_log(node).count(", train, ") == 4  # it trains on both nodes, in every attempt
    events = (job.run_dir / "events.log").read_text()
    assert [f"attempt {attempt}, from step_" in events for attempt in (1, 2, 3)] == [True] * 3
    assert_same_end(job.run_dir, whole, leaving_out=AT_SAVES)


def test_a_lost_node_requeues_the_job(cluster: SlurmCluster, digits: Path, whole: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, digits, *TRAIN, REQUEUE_CODE="0")
    job.wait_for_step(20)
    cluster.lose_node(1)
    job.wait(lambda: cluster.job(job.number)["JobState"] == "PENDING", "requeued")
    cluster.start_lost_nodes()
    # Slurm may end attempt 1 on the node for attempt 0; if that falls into the last step, torchrun's agent on the other
    # node waits for this one's for 300 s before it ends.
    job.end("COMPLETED", 480)
    assert job.restarts >= 1
    assert "slurm: attempt 1, from step_" in job.log
    assert any(word in job.log for word in ("lost: node1", "a node is lost", "Node failure on node1"))
    assert_same_end(job.run_dir, whole, leaving_out=AT_SAVES)


def test_a_lost_node_is_left_behind(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    """--no-kill and ON_NODE_LOSS=shrink: the other node goes on from the last checkpoint, with its own heads."""
    job = Job(cluster, tmp_path, digits, *TRAIN, "--no-kill", ON_NODE_LOSS="shrink")
    job.wait_for_step(20)
    cluster.lose_node(1)
    lines = job.end("COMPLETED")
    assert job.restarts == 0
    assert any(line.startswith("slurm: lost: node1") for line in lines)
    assert any(line.startswith("slurm: restarts on node0 from step_000000") for line in lines)
    assert "4 heads are now 2" in job.log
    assert records(job.run_dir)[-1]["step"] == 96


def test_scancel_saves_and_leaves_nothing_running(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, digits, *TRAIN, "train.duration=100000", "checkpoint.every=0")
    job.wait_for_step(14)
    cluster.run("scancel", str(job.number))
    job.end("CANCELLED", 30)
    assert job.restarts == 0
    saved = whole_checkpoints(job.run_dir)
    assert [path.name for path in saved] == [f"step_{records(job.run_dir)[-1]['step']:08d}"]
    assert len(tensors(saved[0])) > 10
    assert main(["eval", str(saved[0])]) == 0
    assert "slurm: stopped by SIGTERM" in job.log


def test_a_killed_rank_is_named_and_the_job_restarts_while_it_makes_progress(
    cluster: SlurmCluster, digits: Path, whole: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, digits, *TRAIN)
    job.wait_for_step(20)
    kill_a_rank(cluster)
    lines = job.end("COMPLETED")
    assert job.restarts == 0
    restarted = [line for line in lines if line.startswith("slurm: restarts on node0 node1 from step_000000")]
    assert len(restarted) == 1
    assert restarted[0].endswith("was killed by signal 9")
    assert "after: node1: rank " in restarted[0]
    assert_same_end(job.run_dir, whole)


def test_without_progress_the_first_error_is_the_last_line(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, digits, *TRAIN, "train.duration=100000", "checkpoint.every=0")
    job.wait_for_step(3)
    kill_a_rank(cluster)
    lines = job.end("FAILED")
    assert lines[-1].startswith("slurm: first error: node1: rank ")
    assert lines[-1].endswith(" was killed by signal 9")
    assert not [line for line in lines if "Traceback" in line]
    assert "Traceback" in job.node_log("node0")


def kill_a_rank(cluster: SlurmCluster) -> None:
    """kill -9 of one rank on node1: a training process whose parent is no Python's data worker."""
    ranks = {}
    for pid in cluster.processes("-m lte_scale train", node=1):
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if b"LOCAL_RANK=1" in environ:
            ranks[pid] = len(environ)
    os.kill(min(ranks), signal.SIGKILL)


def test_mistakes_end_within_seconds_with_one_message(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    cases = {
        "config": (digits, ["merge.evry=3"], {}, "merge.evry", "merge.every"),
        "no-config": (digits, [], {"CONFIG": "/nowhere/vit.yaml"}, "CONFIG: /nowhere/vit.yaml", "no such file"),
        "no-data": (tmp_path / "nothing", [], {}, str(tmp_path / "nothing"), "preflight: node0"),
        "engine": (digits, [], {"ENGINE": "fsdq"}, "ENGINE: 'fsdq'", "use fsdp or deepspeed"),
        "image": (digits, [], {"CONTAINER": "nowhere.sif"}, "CONTAINER: nowhere.sif", "no such file"),
        "no-pyxis": (digits, [], {"CONTAINER": "lte:cuda"}, "CONTAINER: 'lte:cuda'", "apptainer runs"),
        "override": (digits, ["duration"], {}, "'duration' is no override", "key=value"),
    }
    for name, (data, words, env, *said) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        began = time.monotonic()
        job = Job(cluster, folder, data, *TRAIN, *words, **env)
        lines = job.end("FAILED", 60)
        assert time.monotonic() - began < 45, name
        assert [word for word in said if word not in job.log] == [], job.log
        assert len([line for line in lines if said[0] in line]) == 1, job.log
        assert "Traceback" not in job.log
        assert not (job.run_dir / "metrics.jsonl").exists()


def test_deepspeed(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    """ENGINE=deepspeed: DeepSpeed's launcher on both nodes; USR1, `scontrol requeue`, resumed."""
    pytest.importorskip("deepspeed")
    job = Job(cluster, tmp_path, digits, *TRAIN, ENGINE="deepspeed", DS_ACCELERATOR="cpu", REQUEUE_CODE="0")
    job.wait_for_step(14)
    cluster.run("scancel", "-b", "--signal=USR1", str(job.number))
    job.end("COMPLETED")
    assert job.restarts == 1
    assert (job.run_dir / "deepspeed.json").exists()
    assert [r["step"] for r in records(job.run_dir)] == list(range(1, 97))


def test_one_run_directory_is_for_one_job_at_a_time(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    sizes = ["--nodes=1", "--gpus-per-node=1"]
    first = Job(cluster, tmp_path, digits, *TRAIN, "train.duration=100000", *sizes)
    first.wait(lambda: (first.run_dir / "slurm" / "job").exists(), "started")
    second = Job(cluster, tmp_path, digits, *TRAIN, *sizes)
    assert cluster.wait_for_end(second.number, 30) == "FAILED"
    assert f"slurm: RUN_DIR: job {first.number} is running in {first.run_dir}" in first.log
    cluster.run("scancel", str(first.number))
    first.end("CANCELLED", 30)


def test_a_container_runs_the_command_of_every_node(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "lte.sif").touch()
    job = Job(cluster, tmp_path, digits, CONTAINER=str(tmp_path / "lte.sif"), DRY_RUN="1")
    lines = job.end("COMPLETED", 30)
    inside = (
        f"{tmp_path / 'lte.sif'} {ROOT}/launchers/torchrun.sh train {ROOT}/configs/demo.yaml data.train={digits}/train"
    )
    assert len(lines) == 2
    for line in lines:
        assert "threads each: apptainer exec --nv --bind " in line
        assert all(f"{place}:{place}" in line for place in (ROOT, digits, job.run_dir))
        assert f" --pwd {tmp_path} {inside} " in line


def test_sweeps_take_a_value_per_task(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    sweep = str(ROOT / "slurm" / "sweep_array.sh")
    sizes = ["--nodes=1", "--array=0-4"]
    job = Job(cluster, tmp_path, digits, *sizes, script=sweep, DRY_RUN="1")
    until = time.monotonic() + 60
    while cluster.run("squeue", "-h") and time.monotonic() < until:
        time.sleep(0.3)
    for value in (10, 25, 50, 100):
        assert f"merge.every={value} run_dir={job.run_dir}/merge.every={value}" in job.log
    assert "slurm: VALUES: task 4 of 4 values; use sbatch --array=0-3" in job.log
