"""The emulated nodes: what ranks see, how exit codes and signals travel, and that nothing is left behind."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EMULATE = Path(__file__).parent.parent / "launchers" / "emulate.py"

SCRIPT = """
import os, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
os.write(1, (repr({n: int(os.environ[n]) for n in names}) + "\\n").encode())
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
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(EMULATE),
        "--nodes",
        "2",
        "--ranks-per-node",
        "2",
        *options,
        "--",
        str(script),
        *words,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left(script: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(script) in words:
            found.append(" ".join(words))
    return found


def wait_for_ranks(job: subprocess.Popen[str]) -> None:
    assert job.stdout is not None
    for _ in range(4):
        assert job.stdout.readline().startswith("{")


def test_ranks_are_numbered_node_by_node(script: Path) -> None:
    job = start(script, "end", "0")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    seen = sorted((ast.literal_eval(line) for line in output.splitlines()), key=lambda s: s["RANK"])
    assert [s["RANK"] for s in seen] == [0, 1, 2, 3]
    for s in seen:
        assert s["RANK"] == 2 * s["GROUP_RANK"] + s["LOCAL_RANK"]
        assert (s["WORLD_SIZE"], s["LOCAL_WORLD_SIZE"]) == (4, 2)


@pytest.mark.parametrize("code", [1, 2])
def test_the_exit_code_of_the_rank_that_failed(script: Path, code: int) -> None:
    job = start(script, "end", str(code))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code
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


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="needs root and iproute2")
def test_links_are_throttled_and_counted(script: Path) -> None:
    job = start(script, "send", "0", options=("--link-mbit", "8"))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    seconds = [float(line.split()[1]) for line in output.splitlines() if line.startswith("seconds")]
    assert min(seconds) > 0.5  # 1 MB of numbers and a ring over two nodes at 1 MB/s
    sent = [int(line.split()[3].replace(",", "")) for line in output.splitlines() if line.startswith("node ")]
    assert all(1_000_000 < count < 2_500_000 for count in sent)
    assert "lte" not in subprocess.check_output(["ip", "netns", "list"], text=True)
