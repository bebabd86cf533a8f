"""The launchers: what the ranks see, how exit codes and signals travel, and that nothing is left behind."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EMULATE = ROOT / "launchers" / "emulate.py"

SCRIPT = """
import os, signal, socket, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
seen = {n: int(os.environ[n]) for n in names}
seen["host"], seen["interface"] = socket.gethostname(), os.environ["GLOO_SOCKET_IFNAME"]
os.write(1, (repr(seen) + "\\n").encode())
what, code = sys.argv[1:3]
if what == "wait":
    until = time.time() + 60
    while not stopped and time.time() < until:
        time.sleep(0.05)
    os.write(1, b"saved\\n")
if what == "send":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    began = time.time()
    dist.all_reduce(torch.ones(250_000))
    os.write(1, f"seconds {time.time() - began}\\n".encode())
    dist.destroy_process_group()
sys.exit(int(code) if os.environ["RANK"] == "3" or what == "wait" else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    yield path
    for pid in left(path):  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def start(
    script: Path, *words: str, options: tuple[str, ...] = (), before: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    size = ["--nodes", "2", "--ranks-per-node", "2"]
    command = [*before, sys.executable, str(EMULATE), *size, *options, "--", str(script), *words]
    env = {**os.environ, **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def left(script: Path) -> list[int]:
    """Process ids of launchers, agents and ranks of `script`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(script) in words:
            found.append(int(path.parent.name))
    return found


def wait_for_ranks(job: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert job.stdout is not None
    seen = [ast.literal_eval(job.stdout.readline()) for _ in range(4)]
    return sorted(seen, key=lambda s: s["RANK"])


def network_left(job: subprocess.Popen[str]) -> list[str]:
    """Links, namespaces and files of the emulation whose launcher is `job`."""
    folders = [Path("/sys/class/net"), Path("/run/netns"), Path("/etc/netns")]
    return [str(path) for folder in folders for path in folder.glob(f"lte{job.pid}[bn]*")]


def test_ranks_are_numbered_node_by_node(script: Path) -> None:
    job = start(script, "end", "0")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    seen: list[dict[str, Any]] = sorted(map(ast.literal_eval, output.splitlines()), key=lambda s: s["RANK"])
    assert [s["RANK"] for s in seen] == [0, 1, 2, 3]
    for s in seen:
        assert s["RANK"] == 2 * s["GROUP_RANK"] + s["LOCAL_RANK"]
        assert (s["WORLD_SIZE"], s["LOCAL_WORLD_SIZE"]) == (4, 2)


@pytest.mark.parametrize("code", [1, 2])
def test_the_exit_code_of_the_rank_that_failed(script: Path, code: int) -> None:
    job = start(script, "end", str(code), RANK="0")  # as inside another launcher's job
    began = time.monotonic()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code
    assert time.monotonic() - began < 20
    assert "Traceback" not in output
    assert left(script) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_of_all_nodes(script: Path, number: signal.Signals) -> None:
    job = start(script, "wait", "143")
    wait_for_ranks(job)
    began = time.monotonic()
    job.send_signal(number)
    output, _ = job.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert output.count("saved") == 4
    assert job.returncode == 128 + number
    assert left(script) == []


def test_a_hangup_does_not_end_what_nohup_started(script: Path) -> None:
    job = start(script, "wait", "143", before=("nohup",))
    wait_for_ranks(job)
    job.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert job.poll() is None
    job.terminate()
    job.communicate(timeout=30)
    assert left(script) == []


def test_nothing_outlives_a_launcher_that_is_killed(script: Path) -> None:
    job = start(script, "wait", "143")
    wait_for_ranks(job)
    job.kill()
    until = time.monotonic() + 20
    while left(script) and time.monotonic() < until:
        time.sleep(0.1)
    assert left(script) == []


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--link-mbit", "-1"]])
def test_bad_arguments_exit_2(words: list[str]) -> None:
    command = [sys.executable, str(EMULATE), "--nodes", "2", "--ranks-per-node", "2", *words, "--", "train", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "at least 1" in done.stderr or "above 0" in done.stderr


def test_torchrun_sh_runs_on_a_machine_without_gpu_tools(tmp_path: Path) -> None:
    for tool in ("bash", "env", "grep", "nproc"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "torchrun").write_text(f"#!{sys.executable}\nfrom torch.distributed.run import main\nmain()\n")
    (tmp_path / "torchrun").chmod(0o755)
    words = ["train", str(ROOT / "configs" / "demo.yaml"), "merge.every=40", "--print-config"]
    command = [str(ROOT / "launchers" / "torchrun.sh"), *words]
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "every: 40" in done.stdout
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "NNODES": "2"}, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode != 0
    assert "NODE_RANK: number of this node, from 0" in done.stderr


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")), reason="needs root and iproute2"
)


@pytest.mark.slow
@needs_namespaces
def test_links_are_throttled_and_counted(script: Path) -> None:
    job = start(script, "send", "0", options=("--link-mbit", "8"))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    seconds = [float(line.split()[1]) for line in output.splitlines() if line.startswith("seconds")]
    assert min(seconds) > 0.5  # 1 MB of numbers and a ring over two nodes at 1 MB/s
    sent = [int(line.split()[3].replace(",", "")) for line in output.splitlines() if line.startswith("node ")]
    assert all(1_000_000 < count < 2_500_000 for count in sent)
    assert network_left(job) == []


@pytest.mark.slow
@needs_namespaces
def test_two_networks_at_once_and_both_cleaned_up(script: Path) -> None:
    link = ("--link-mbit", "50")
    killed = start(script, "wait", "143", options=link, GLOO_SOCKET_IFNAME="of-the-machine")
    seen = wait_for_ranks(killed)
    assert [(s["host"], s["interface"]) for s in seen] == [(f"node{n}", "eth0") for n in (0, 0, 1, 1)]
    stopped = start(script, "wait", "143", options=link)
    wait_for_ranks(stopped)
    stopped.send_signal(signal.SIGINT)
    output, _ = stopped.communicate(timeout=30)
    assert stopped.returncode == 130
    assert output.count("saved") == 4
    assert output.count(" bytes") == 2
    assert network_left(stopped) == []
    assert network_left(killed)  # the other one is untouched

    killed.kill()
    killed.wait()
    until = time.monotonic() + 20
    while left(script) and time.monotonic() < until:
        time.sleep(0.1)
    assert left(script) == []
    last = start(script, "end", "0", options=link)
    last.communicate(timeout=60)
    assert last.returncode == 0
    assert network_left(killed) == network_left(last) == []  # the next run clears what a killed one left
