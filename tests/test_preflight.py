"""Preflight on real processes: two nodes of two ranks on loopback, whole and with everything that may be wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from lte_scale.cli import main
from lte_scale.config import load_config
from lte_scale.preflight import local
from lte_scale.preflight.compare import Answer, Failure, cause, clock_offset, differences, failure_lines
from lte_scale.preflight.local import NodeCheck, Report, checkpoint_bytes
from lte_scale.preflight.place import Place, from_environment
from lte_scale.run_dir import whole_checkpoints
from lte_scale.topology import Topology
from tests.harness import free_port

CONFIG = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
PLACE = Place(nodes=1, node=0, ranks=1, address="127.0.0.1", port=1)


class Job:
    """Nodes of two ranks as processes of this machine; `extra` are the words of single nodes."""

    def __init__(
        self, data: Path, run_dir: Path, *words: str, nodes: int = 2, extra: Mapping[int, Sequence[str]] | None = None,
        absent: Sequence[int] = (),
    ) -> None:  # fmt: skip
        environ = {**os.environ, "NNODES": str(nodes), "NPROC": "2", "MASTER_PORT": str(free_port())}
        environ |= {"GLOO_SOCKET_IFNAME": "lo", "NODE_NAMES": " ".join(f"node{node}" for node in range(nodes))}
        words = (f"data.train={data}/train", f"data.val={data}/val", f"run_dir={run_dir}", *words)
        command = [sys.executable, "-m", "lte_scale", "preflight", CONFIG, *words]
        self.began = time.monotonic()
        self.nodes = {
            node: subprocess.Popen(
                [*command, *(extra or {}).get(node, ())], env={**environ, "NODE_RANK": str(node)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for node in range(nodes)
            if node not in absent
        }  # fmt: skip

    def end(self, code: int) -> list[str]:
        """The lines of node 0. Other nodes say nothing, and end with the same code."""
        said = {node: process.communicate(timeout=60)[0] for node, process in self.nodes.items()}
        assert {node: process.returncode for node, process in self.nodes.items()} == dict.fromkeys(self.nodes, code), (
            said
        )
        assert [text for node, text in said.items() if node] == [""] * (len(said) - 1)
        assert "Traceback" not in said[0]
        return said[0].splitlines()

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks of all nodes, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if b"lte_scale.preflight.ranks" in words and parent in {p.pid for p in self.nodes.values()}:
                topology = re.search(rb'"rank": (\d+)', words[-2])
                assert topology
                found[int(topology[1])] = int(folder.name)
        return found

    def wait_for_ranks(self, count: int = 4) -> dict[int, int]:
        until = time.monotonic() + 90
        while len(found := self.ranks()) < count:
            assert time.monotonic() < until
            time.sleep(0.02)
        return found


def gone(pids: Sequence[int]) -> bool:
    until = time.monotonic() + 5
    while (left := any(Path(f"/proc/{pid}").exists() for pid in pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not left


def test_two_nodes_whose_ranks_share_a_head_pass(digits: Path, tmp_path: Path) -> None:
    lines = Job(digits, tmp_path / "run", "topology.heads_per_node=1").end(0)
    assert [line.split()[0] for line in lines[1:4]] == ["node", "node0", "node1"]
    assert lines[4].startswith("all-reduce inside the nodes: ") and "GB/s per rank (slowest node" in lines[4]
    assert lines[5].startswith("all-reduce between the nodes: ") and "Gbit/s per node (slowest node" in lines[5]
    assert lines[6].startswith("preflight: passed in ")


@pytest.mark.slow
def test_a_node_whose_ranks_have_several_heads_passes(digits: Path, tmp_path: Path) -> None:
    lines = Job(digits, tmp_path / "run", "topology.heads_per_node=4", nodes=1).end(0)
    assert [line.split(":")[0] for line in lines[-2:]] == ["all-reduce inside the nodes", "preflight"]


def test_one_plain_process_passes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    run_dir = tmp_path / "run"
    words = [CONFIG, f"data.train={digits}/train", "data.val=", f"run_dir={run_dir}"]
    assert main(["preflight", *words]) == 0
    assert "preflight: passed" in capsys.readouterr().out
    monkeypatch.setattr(local, "free_bytes", lambda path: 1000)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert main(["preflight", *words]) == 3
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("preflight: node 0: run_dir: 0.0 MB free at")] != []
    assert "2 checkpoints need about" in "\n".join(said)


def test_a_node_that_never_reports_is_named(digits: Path, tmp_path: Path) -> None:
    lines = Job(digits, tmp_path / "run", "--deadline=2", nodes=2, absent=[1]).end(3)
    assert lines[-1].startswith("preflight: node1: no report within 2 s")


def test_data_missing_on_one_node(digits: Path, tmp_path: Path) -> None:
    lines = Job(digits, tmp_path / "run", extra={1: [f"data.train={tmp_path}/nothing"]}).end(3)
    assert lines[-1].startswith(f"preflight: node1: data.train: {tmp_path}/nothing: no such directory")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_fails_or_hangs_is_named(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    job = Job(digits, tmp_path / "run", "--deadline=14")
    ranks = job.wait_for_ranks()
    os.kill(ranks[3], number)
    lines = job.end(3)
    reason = (
        "rank 3 was killed by SIGKILL in the all-reduce" if number == signal.SIGKILL else "rank 3: no answer within"
    )
    assert lines[-1].startswith(f"preflight: node1: {reason}")
    assert time.monotonic() - job.began < 80
    assert gone(list(ranks.values()))


def test_a_signal_ends_a_node_and_its_ranks(digits: Path, tmp_path: Path) -> None:
    job = Job(digits, tmp_path / "run")
    ranks = job.wait_for_ranks()
    for process in job.nodes.values():
        process.send_signal(signal.SIGTERM)
    for process in job.nodes.values():
        process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGTERM
    assert gone(list(ranks.values()))


@pytest.mark.slow
def test_a_refused_configuration_is_one_line_of_all_nodes(digits: Path, tmp_path: Path) -> None:
    lines = Job(digits, tmp_path / "run", "topology.heads_per_node=3").end(2)
    assert len(lines) == 1
    assert "3 heads cannot be placed on 2 ranks per node" in lines[0]


@pytest.mark.parametrize(
    ("environ", "word"),
    [({"NNODES": "two"}, "NNODES"), ({"NODE_RANK": "1"}, "NODE_RANK"), ({"NODE_NAMES": "a b"}, "NODE_NAMES")],
)
def test_variables_that_contradict_one_another(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        from_environment("cpu", environ)


def test_checks_that_hang_name_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(self: NodeCheck) -> Iterator[str]:
        time.sleep(1)
        yield from ()

    monkeypatch.setattr(NodeCheck, "_data", hang)
    config = load_config(CONFIG, [f"run_dir={tmp_path}/run"])
    check = NodeCheck(config, PLACE, Topology(), checkpoint=0)
    assert check.finish(0.2).failures == ["checks did not end within 0 s: the last one was 'data'"]
    assert check.hangs
    check.thread.join()


def test_the_estimate_of_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    overrides = ["engine=none", "base.gather=pass", "topology.heads_per_node=2", "train.duration=2", "data.workers=0",
                 "merge={every: 2, local_every: 2}", f"data.train={digits}/train", "data.val=", "metrics.port=0",
                 "model.num_classes=10", f"run_dir={tmp_path}",
                 "model.arguments={patch_size: 2, embed_dim: 256, depth: 3, num_heads: 4}"]  # fmt: skip
    assert main(["train", CONFIG, *overrides]) == 0
    written = sum(path.stat().st_size for path in whole_checkpoints(tmp_path)[-1].glob("*.distcp"))
    estimate = checkpoint_bytes(load_config(CONFIG, overrides), Topology(heads_per_node=2))
    assert 0.85 * written < estimate < 1.15 * written


def named(node: int) -> str:
    return f"node{node}"


def test_differences_name_the_odd_node() -> None:
    def report(**changed: object) -> Report:
        usual: dict[str, object] = {"ranks": 8, "gpus": ["H100 80 GiB"] * 8, "samples": {"data.train": 100}}
        return Report(**{**usual, "versions": {"torch": "2.14.1"}, **changed})  # type: ignore[arg-type]

    cases: list[tuple[Callable[[], Report], str]] = [
        (lambda: report(gpus=["H100 80 GiB"] * 7), "GPUs: 7 x H100 80 GiB here, 8 x H100 80 GiB on node0; "),
        (lambda: report(ranks=7), "ranks (NPROC): 7 here, 8 on node0; "),
        (lambda: report(versions={"torch": "2.13.0"}), "torch: 2.13.0 here, 2.14.1 on node0; "),
        (lambda: report(samples={"data.train": 99}), "data.train: samples: 99 here, 100 on node0; "),
    ]
    for odd, reason in cases:
        (found,) = differences({0: report(), 1: report(), 2: odd()}, named)
        assert found.node == 2 and found.reason.startswith(reason)
    first_is_odd = {0: report(ranks=4), 1: report(), 2: report()}
    assert [failure.node for failure in differences(first_is_odd, named)] == [0]
    assert differences({0: report(), 1: report(ranks=4, failures=["says so itself"])}, named) == []


@pytest.mark.parametrize(
    ("answered", "received", "offset", "too_far"),
    [(100.01, 100.02, 0, False), (103, 100.02, 2.99, True), (97, 100.02, -3.01, True), (103, 104, 1, False)],
)
def test_clocks_may_be_as_far_apart_as_the_answer_took(
    answered: float, received: float, offset: float, too_far: bool
) -> None:
    found, verdict = clock_offset(100.0, answered, received)
    assert found == pytest.approx(offset)
    assert verdict == too_far


def test_the_cause_of_many_failures() -> None:
    lost = Answer(order=1, failure="failed: Connection closed by peer")
    late = Answer(order=2, failure="failed: Timed out waiting 15000ms for recv operation to complete")
    own = Answer(order=3, failure="failed: got 9 from the all-reduce of ranks 0, 1, expected 10")
    died = Answer(order=4, failure="was killed by SIGKILL in the all-reduce", died=True)
    assert cause({0: Answer(), 1: Answer()}, {}, range(2), 3) == {}
    assert list(cause({0: lost, 1: late, 2: own, 3: died}, {}, range(4), 3)) == [3]
    assert list(cause({0: lost, 1: late, 2: own}, {}, range(4), 3)) == [2]
    assert cause({0: late, 1: lost}, {0: 2, 1: 2, 2: 3, 3: 2}, range(4), 16) == {3: "rank 3: no answer within 16 s"}
    assert list(cause({0: late, 1: lost}, {}, range(2), 3)) == [1]


def test_nodes_that_share_a_reason_share_a_line() -> None:
    failures = [Failure(1, "no data"), Failure(0, "no data"), Failure(1, "no GPU")]
    assert failure_lines(failures, named) == ["preflight: node0, node1: no data", "preflight: node1: no GPU"]
