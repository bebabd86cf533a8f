"""DeepSpeed's launcher on two nodes with sshd and pdsh: interrupted and killed, resumed, nothing left on any node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from lte_scale.run_dir import whole_checkpoints
from tests.ssh_cluster import ROOT, Cluster, missing
from tests.test_train import EMULATE, SMALL, command, finish, records, tensors, wait_for_step

hostfile = import_module("hostfile")  # of launchers/, which tests.ssh_cluster puts on the path

TRAIN = str(ROOT / "launchers" / "train.py")
LAUNCHER = str(ROOT / "launchers" / "deepspeed.sh")
CONFIG = str(ROOT / "configs" / "demo.yaml")
ENGINE = "engine=deepspeed" if find_spec("lte_scale.engines.deepspeed") else "engine=fsdp"
LONG = [
    *SMALL,
    "merge={every: 8, local_every: 4}",
    "train.duration=96",
    "data.workers=1",
    "checkpoint.every=12",
    "evaluate.every=96",
]
COMPARED = ("step", "images", "loss", "grad_norm", "lr", "eval_top1")
STOPPED_WITHIN_SECONDS = 15  # 4 to 7 where nothing else runs
LACKS = missing()
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
    assert [name for name in cluster.network.namespaces if (Path("/run/netns") / name).exists()] == []


@pytest.fixture
def cluster(machines: Cluster) -> Iterator[Cluster]:
    """Nodes on which nothing runs."""
    yield machines
    machines.kill()  # what a test that failed left


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, started by torchrun."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    job = [*EMULATE, *command(digits, run_dir, *LONG, ENGINE)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    finish(subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
    return run_dir


def by_script(cluster: Cluster, words: list[str], hosts: Path | None = None) -> subprocess.Popen[str]:
    job = [LAUNCHER, "--hostfile", str(hosts or cluster.hostfile), *words]
    return cluster.start(0, job, ENVIRONMENT, cwd=cluster.folder)


def by_deepspeed(cluster: Cluster, words: list[str]) -> subprocess.Popen[str]:
    """As someone does who has never seen our launcher."""
    file = cluster.folder / "my_env"
    file.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    job = ["deepspeed", "--hostfile", str(cluster.hostfile), TRAIN, *words]
    return cluster.start(0, job, {**ENVIRONMENT, "DS_ENV_FILE": str(file)}, cwd=cluster.folder)


def last_step(run_dir: Path) -> int:
    whole = whole_checkpoints(run_dir)
    return int(whole[-1].name.removeprefix("step_")) if whole else 0


def stop(job: subprocess.Popen[str], cluster: Cluster, run_dir: Path, also: subprocess.Popen[str] | None = None) -> str:
    """SIGTERM to the launcher: all processes of all nodes end in time, with a checkpoint. What `also` or it said."""
    before, began = records(run_dir)[-1]["step"], time.monotonic()
    job.terminate()
    outputs = [process.communicate(timeout=60)[0] for process in (job, also) if process]
    assert cluster.wait_until_empty(30) == {}, outputs
    assert time.monotonic() - began < STOPPED_WITHIN_SECONDS, outputs
    assert last_step(run_dir) >= before, outputs
    assert last_step(run_dir) == records(run_dir)[-1]["step"]
    return outputs[-1]


def assert_same_weights(run_dir: Path, other: Path) -> None:
    ours, theirs = tensors(whole_checkpoints(run_dir)[-1]), tensors(whole_checkpoints(other)[-1])
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    last, his = records(run_dir)[-1], records(other)[-1]
    assert [last[key] for key in COMPARED] == [his[key] for key in COMPARED]


def on_cluster(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.skipif(bool(LACKS), reason=f"needs {LACKS}")):
        test = mark(test)
    return test


@on_cluster
def test_stopped_and_killed_in_every_way(cluster: Cluster, digits: Path, whole: Path, tmp_path: Path) -> None:
    """launchers/deepspeed.sh: SIGTERM, kill -9 of a rank, kill -9 of the launcher; then to the end."""
    run_dir = tmp_path / "run"
    words = command(digits, run_dir, *LONG, ENGINE)
    job = by_script(cluster, words)
    wait_for_step(job, run_dir, 14)
    output = stop(job, cluster, run_dir)
    assert job.returncode == 128 + signal.SIGTERM
    assert "all ranks end after step" in output
    stopped = last_step(run_dir)

    job = by_script(cluster, words)
    wait_for_step(job, run_dir, stopped + 7)
    assert cluster.kill(f"{TRAIN} --local_rank=1", str(run_dir)) > 0
    output, _ = job.communicate(timeout=60)
    assert job.returncode not in (0, 2)
    assert f"at step {stopped} of 96" in output
    assert cluster.wait_until_empty(5) == {}

    before = records(run_dir)[-1]["step"]
    job = by_script(cluster, words)
    wait_for_step(job, run_dir, int(before) + 7)
    job.kill()
    assert cluster.wait_until_empty(20) == {}
    job.communicate(timeout=60)
    assert last_step(run_dir) > before

    finish(by_script(cluster, words))
    assert cluster.wait_until_empty(5) == {}
    assert_same_weights(run_dir, whole)


@on_cluster
def test_the_plain_command_of_deepspeed(cluster: Cluster, digits: Path, whole: Path, tmp_path: Path) -> None:
    """SIGTERM; then everything on the launching machine killed at once; then to the end."""
    run_dir = tmp_path / "run"
    words = command(digits, run_dir, *LONG, ENGINE)
    job = by_deepspeed(cluster, words)
    wait_for_step(job, run_dir, 14)
    stop(job, cluster, run_dir)
    assert job.returncode == 1

    endless = [*words, "train.duration=100000", "run_dir=" + str(tmp_path / "abandoned")]
    job = by_deepspeed(cluster, endless)
    wait_for_step(job, tmp_path / "abandoned", 7)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate(timeout=10)
    assert cluster.processes(TRAIN)  # the nodes learn of it by nobody reading what they write
    assert cluster.wait_until_empty(60) == {}
    assert last_step(tmp_path / "abandoned") > 7

    finish(by_deepspeed(cluster, words))
    assert_same_weights(run_dir, whole)


@on_cluster
def test_without_ssh(cluster: Cluster, digits: Path, whole: Path, tmp_path: Path) -> None:
    """One launcher per node. SIGTERM to the second alone, then kill -9 of its agent, end both nodes, saved."""
    run_dir = tmp_path / "run"
    words = command(digits, run_dir, *LONG, ENGINE)

    def start() -> list[subprocess.Popen[str]]:
        environ = {**ENVIRONMENT, "MASTER_ADDR": "node0", "HOSTFILE": str(cluster.hostfile)}
        job = [LAUNCHER, "--no_ssh", *words]
        return [cluster.start(n, job, {**environ, "NODE_RANK": str(n)}, cwd=cluster.folder) for n in range(2)]

    first, second = start()
    wait_for_step(first, run_dir, 14)
    first_output = stop(second, cluster, run_dir, also=first)
    assert second.returncode == 128 + signal.SIGTERM
    assert first.returncode not in (0, 2)
    assert "the same command resumes" in first_output
    stopped = last_step(run_dir)

    first, second = start()
    wait_for_step(first, run_dir, stopped + 7)
    assert cluster.kill("-m deepspeed.launcher.launch", "--node_rank=1") == 1  # what started the ranks of a node
    assert cluster.wait_until_empty(20) == {}
    first_output, _ = first.communicate(timeout=10)
    second.communicate(timeout=10)
    assert "the same command resumes" in first_output
    assert last_step(run_dir) > stopped
    for job in start():
        finish(job)
    assert_same_weights(run_dir, whole)


@on_cluster
def test_words_arrive_as_they_were_given(cluster: Cluster, tmp_path: Path) -> None:
    strange = [
        "data.train=pipe:cat /d/$HOME-`id`-%h-100%/{000..003}.tar | \"tr\" 'a' \\b;#or so",
        "data.val=/d/{000..003}-%2F-$HOME-*-%n.tar",
        "data.allow_pipe=true",
        "run_dir=it's&me",
    ]
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    output = finish(by_script(cluster, ["train", CONFIG, *strange, "--print-config"], hosts))
    lines = [line.removeprefix("node1: ") for line in output.splitlines() if line.startswith("node1: ")]
    printed = yaml.safe_load("\n".join(line for line in lines if not line.startswith("[2")))
    assert [f"data.train={printed['data']['train']}", f"data.val={printed['data']['val']}"] == strange[:2]
    assert f"run_dir={printed['run_dir']}" == strange[3]


@on_cluster
def test_stopped_while_starting(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    job = by_script(cluster, command(digits, tmp_path / "run", *LONG, "train.duration=100000", ENGINE))
    time.sleep(4)  # nothing runs on the nodes yet, or only what starts the ranks
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=40)
    assert job.returncode == 128 + signal.SIGINT, output
    assert cluster.wait_until_empty(5) == {}


@on_cluster
def test_a_refusal_by_the_ranks_comes_back_as_exit_code_2(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    words = command(digits, tmp_path / "run", *LONG, "topology.heads_per_node=3")
    output = finish(by_script(cluster, words), 2)
    assert output.count("lte-scale:") == 1
    assert "3 heads cannot be placed on 2 ranks per node" in output


@on_cluster
def test_a_node_that_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    absent = cluster.network.address(8)  # of this network, and nobody's
    hosts.write_text(f"node0 slots=2\n{absent} slots=2\n")
    began = time.monotonic()
    job = cluster.start(0, [LAUNCHER, "--hostfile", str(hosts), "train", CONFIG], ENVIRONMENT)
    output = finish(job, 2)
    assert time.monotonic() - began < 15
    assert output.count("\n") == 1
    assert f"node {absent} cannot be reached: ssh: connect to host {absent}" in output
    assert cluster.wait_until_empty(5) == {}


def refused(*words: str, cwd: Path, python: tuple[str, ...] = (sys.executable,), **variables: str) -> str:
    """The one line with which the launcher refuses."""
    environ = {name: value for name, value in os.environ.items() if name not in ("HOSTFILE", "NODE_RANK")}
    job = [*python, str(ROOT / "launchers" / "deepspeed_job.py"), *words]
    done = subprocess.run(
        job, cwd=cwd, env={**environ, **variables}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["names no node", "node1 slots=8"]),
        ("# only this\n\n", ["names no node"]),
        ("node1 slots=2\nnode2\n", ["line 2, 'node2'", "no name and slots"]),
        ("node1 slots=two\n", ["line 1, 'node1 slots=two'"]),
        ("node1 slots=0\n", ["line 1", "at least one slot"]),
        ("node1 slots=2\n# a comment\nnode2 slots=3\n", ["line 3", "3 slots, but node1 has 2", "same number"]),
        ("node1 slots=2\nnode1 slots=2\n", ["line 2", "node1 is there already"]),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match="hosts") as refusal:
        hostfile.read(tmp_path / "hosts")
    assert [word for word in words if word not in str(refusal.value)] == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    hosts = ["--hostfile", "hosts"]
    assert "no hostfile" in refused("train", CONFIG, cwd=tmp_path)
    assert "hostfile of-environment: cannot" in refused("train", CONFIG, cwd=tmp_path, HOSTFILE="of-environment")
    assert "hosts: cannot be read (No such file" in refused(*hosts, "train", CONFIG, cwd=tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    assert "configuration none.yaml: no such file" in refused(*hosts, "train", "none.yaml", cwd=tmp_path)
    assert "--node_rank 2" in refused(*hosts, "--no_ssh", "train", CONFIG, cwd=tmp_path, NODE_RANK="2")
    assert "--node_rank -1" in refused(*hosts, "--no_ssh", "train", CONFIG, cwd=tmp_path)
    (tmp_path / ".deepspeed_env").write_text("A=1\n\nB=2\n")
    assert ".deepspeed_env, line 2, ''" in refused(*hosts, "train", CONFIG, cwd=tmp_path)
    (tmp_path / ".deepspeed_env").unlink()
    assert "ssh is not installed on this machine" in refused(*hosts, "train", CONFIG, cwd=tmp_path, PATH="/nowhere")
    bare = (sys.executable, "-S")  # without its site-packages
    assert "pip install 'lte-scale[deepspeed]'" in refused(*hosts, "train", CONFIG, cwd=tmp_path, python=bare)


def test_the_hostfile_example_is_one() -> None:
    assert hostfile.read(ROOT / "launchers" / "hostfile.example") == {"node1": 8, "node2": 8}


def test_the_script_of_the_ranks_is_the_command_line(tmp_path: Path) -> None:
    words = ["--local_rank=1", "train", CONFIG, "merge.every=40", "--print-config"]
    output = subprocess.check_output([sys.executable, TRAIN, *words], text=True, cwd=tmp_path)
    assert "every: 40" in output
