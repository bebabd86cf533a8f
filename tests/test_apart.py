"""Nodes that are jobs of their own: they merge with those that are there, and outlive one another."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lte_scale.cli import main
from lte_scale.config import check_topology, load_config
from lte_scale.estimate import make_plan
from lte_scale.run_dir import whole_checkpoints
from tests.apart import Node, nodes_apart
from tests.kills import KILLS, SEED
from tests.test_train import ROOT, SMALL, command, finish, records, start, tensors

STEPS = 240
by_hand = pytest.mark.skipif(KILLS <= 3, reason="minutes; asked for by KILLS above 3")

RUN = [*SMALL, "engine=fsdp", "merge={every: 8, local_every: 4, outer: nesterov}", "data.workers=0"]
LONG = [*RUN, f"train.duration={STEPS}", "evaluate.every=120", "checkpoint.every=16"]


def masters(node: Node | Path) -> dict[str, torch.Tensor]:
    run_dir = node.run_dir if isinstance(node, Node) else node
    found = tensors(whole_checkpoints(run_dir)[-1])
    kinds = ("master/", "momentum/", "average/", "replica_master/", "replica_momentum/", "replica_average/")
    return {name: value for name, value in found.items() if name.startswith(kinds)}


def assert_equal(nodes: list[Node]) -> None:
    """Bit for bit."""
    first, *others = map(masters, nodes)
    assert len(first) > 20
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.timeout(900)
def test_equals_one_job(digits: Path, tmp_path: Path) -> None:
    """Two nodes of two ranks, two levels, Nesterov: the masters of all nodes bit for bit; those of one job to 1e-5."""
    words = [*RUN, "train.duration=32", "train.ema_decay=0.9", "evaluate.every=32", "checkpoint.every=32"]
    with nodes_apart(digits, tmp_path, 2, 2, *words) as (_, nodes):
        for node in nodes:
            node.start()
        for node in nodes:
            node.finish()
            assert "step 8: merging with 2 of 2 nodes" in node.events
        assert_equal(nodes)
        assert_bytes_are_planned(nodes[0], merges=4)
    whole = tmp_path / "whole"
    finish(start(command(digits, whole, *words, "merge.path=dense")))
    ours, theirs = masters(nodes[0]), masters(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        largest = float(theirs[name].abs().max())
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


def assert_bytes_are_planned(node: Node, *, merges: int) -> None:
    config = load_config(node.run_dir / "config.yaml")
    planned = make_plan(config, nodes=1, ranks_per_node=node.ranks).global_merge
    sent: Any = records(node.run_dir)[-1]["sent_bytes"]
    for purpose in ("merge_dense", "merge_replica"):
        assert sent[f"inter_node/{purpose}"] == merges * planned["inter_node", purpose]
    # A roll call more, at the start.
    assert sent["inter_node/merge_check"] >= (merges + 1) * planned["inter_node", "merge_check"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["fault_tolerance.lighthouse=head:29510"],
            "fault_tolerance.lighthouse: 'head:29510'; allowed: the address",
        ),
        (
            ["fault_tolerance.lighthouse=http://[head:29510"],
            "fault_tolerance.lighthouse: 'http://[head:29510'; allowed",
        ),
        (["fault_tolerance.node=2"], "fault_tolerance.node: 2 of 2 nodes; they are numbered from 0"),
        (
            ["engine=fsdp", "base.scope=global", "merge.local_every=0"],
            "base.scope: 'global' with fault_tolerance.enabled: nodes that come and go",
        ),
        (["merge.precision=bf16"], "use merge.precision=fp32"),
        (["merge.delay=2"], "use merge.delay=0"),
        ([], "fault_tolerance.lighthouse: http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    ft = "fault_tolerance={enabled: true, lighthouse: 'http://127.0.0.1:9', nodes: 2}"
    assert main(command(digits, tmp_path / "run", *RUN, ft, "engine=none", "base.gather=pass", *words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lte-scale: ")]
    assert len(errors) == 1 and says in errors[0]


def test_a_job_of_two_nodes_is_refused() -> None:
    ft = "fault_tolerance={enabled: true, lighthouse: 'http://127.0.0.1:9', nodes: 2}"
    config = load_config(ROOT / "configs" / "demo.yaml", [ft])
    with pytest.raises(ValueError, match="every node is a job of its own, this one has 2 nodes; start `torchrun"):
        check_topology(config, 2, 2)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["reset", pytest.param("resetless", marks=by_hand)])
def test_a_node_is_killed_and_comes_back(digits: Path, tmp_path: Path, mode: str) -> None:
    """Three nodes, one killed: the others never restart. Back from its checkpoint it takes the masters of another."""
    with nodes_apart(digits, tmp_path, 3, 1, *LONG, f"adapters.mode={mode}") as (_, nodes):
        for node in nodes:
            node.start()
        nodes[2].wait_for_step(17)
        nodes[2].kill()
        nodes[0].wait_for_words("merging with 2 of 3 nodes")
        for node in nodes[:2]:  # or a fast machine ends the run before the node is back
            node.signal(signal.SIGSTOP)
        nodes[2].start()
        nodes[2].wait_for(lambda: nodes[2].events.count("waiting for the other nodes") == 2, "second start", 120)
        for node in nodes[:2]:
            node.signal(signal.SIGCONT)
        nodes[2].wait_for_words("brought up to date by node")
        for node in nodes:
            node.finish()
        assert "merging with 3 of 3 nodes" in nodes[0].events.partition("merging with 2 of 3")[2]
        assert_equal(nodes)
        assert_went_through(nodes[0], nodes[1])


@pytest.mark.faults
@by_hand
def test_a_node_that_stops_for_a_while(digits: Path, tmp_path: Path) -> None:
    """SIGSTOP for longer than the lighthouse waits: the others merge without it, and it takes their masters."""
    with nodes_apart(digits, tmp_path, 3, 1, *LONG) as (_, nodes):
        for node in nodes:
            node.start()
        nodes[1].wait_for_step(9)
        nodes[1].signal(signal.SIGSTOP)
        nodes[0].wait_for_words("merging with 2 of 3 nodes")
        nodes[1].signal(signal.SIGCONT)
        for node in nodes:
            node.finish()
        assert "brought up to date by node" in nodes[1].events
        assert_equal(nodes)
        assert_went_through(*nodes)


@pytest.mark.faults
def test_the_lighthouse_is_lost(digits: Path, tmp_path: Path) -> None:
    """Nodes wait in front of their next merge, and go on when it is there again."""
    with nodes_apart(digits, tmp_path, 2, 1, *LONG) as (lighthouse, nodes):
        for node in nodes:
            node.start()
        nodes[0].wait_for_step(17)
        lighthouse.kill()
        stands_at = _still(nodes[0])
        lighthouse.start()
        nodes[0].wait_for_step(stands_at + 8)
        for node in nodes:
            node.finish()
        assert_equal(nodes)
        assert_went_through(*nodes)


def _still(node: Node) -> int:
    """The step at which it stands."""
    step, since = node.step, time.monotonic()
    while time.monotonic() - since < 8:
        time.sleep(0.1)
        if node.step != step:
            step, since = node.step, time.monotonic()
    assert step < STEPS
    return step


@pytest.mark.faults
@by_hand
def test_a_node_that_does_not_fit_is_refused(digits: Path, tmp_path: Path) -> None:
    """One with another's number, and one with another configuration: one line each; the others go on without them."""
    with nodes_apart(digits, tmp_path, 2, 1, *LONG) as (lighthouse, nodes):
        intruders = []
        for name, words, says in [
            ("same", [], "fault_tolerance.node: 1 is the number of two nodes; start all nodes"),
            ("other", ["adapters.rank=8"], "fault_tolerance: another node has other nodes, ranks, model, adapters"),
        ]:
            ft = f"fault_tolerance={{enabled: true, lighthouse: '{lighthouse.address}', nodes: 2, node: 1}}"
            run_dir = tmp_path / name
            intruders.append((Node(9, run_dir, command(digits, run_dir, *LONG, ft, *words), 1), says))
        for node in nodes:
            node.start()
        nodes[0].wait_for_step(9)
        for intruder, says in intruders:
            for node in nodes:  # or a fast machine ends the run before the intruder is there
                node.signal(signal.SIGSTOP)
            intruder.start()
            intruder.wait_for_words("waiting for the other nodes")
            for node in nodes:
                node.signal(signal.SIGCONT)
            assert intruder.job is not None and intruder.job.wait(120) != 0
            assert len([line for line in intruder.output.splitlines() if line.startswith(f"lte-scale: {says}")]) == 1
        for node in nodes:
            node.finish()
        assert_equal(nodes)
        assert_went_through(*nodes)


@pytest.mark.faults
def test_a_signal_while_a_node_waits(digits: Path, tmp_path: Path) -> None:
    """At the start, for nodes that are not there; and at a merge, for a lighthouse: it saves, and resumes."""

    def stop(node: Node) -> None:
        assert node.job is not None
        node.signal(signal.SIGTERM)
        assert node.job.wait(60) != 0

    with nodes_apart(digits, tmp_path, 2, 2, *LONG, "fault_tolerance.wait_seconds=600") as (lighthouse, nodes):
        nodes[0].start()
        nodes[0].wait_for_words("waiting for the other nodes")
        time.sleep(2)
        stop(nodes[0])
        assert "stopped while waiting for the other nodes" in nodes[0].events
        for node in nodes:
            node.start()
        nodes[0].wait_for_step(9)
        lighthouse.kill()
        step = 1 + _still(nodes[0])  # the step that ends with the merge has no record yet
        for node in nodes:
            stop(node)
            assert f"step {step}: stopped while waiting for the other nodes to merge" in node.events
            assert whole_checkpoints(node.run_dir)[-1].name == f"step_{step:08d}"
        lighthouse.start()
        for node in nodes:
            node.start()
        for node in nodes:
            node.finish()
        assert_equal(nodes)


def assert_went_through(*nodes: Node) -> None:
    """They were never started anew, and had every step."""
    for node in nodes:
        found = records(node.run_dir)
        assert found[-1]["step"] == STEPS and found[-1]["restarts"] == 0


@pytest.mark.faults
@by_hand
def test_random_kills_cost_no_accuracy(digits: Path, tmp_path: Path) -> None:
    """kill -9 of whole nodes at random moments of the demo's run, each started again a little later.

    The others are never started anew, and the accuracy is within a point of the run that nobody disturbed.
    """
    words = ["engine=fsdp", "data.workers=0", "train.duration=1600", "evaluate.every=1600", "checkpoint.every=100"]
    top1 = {}
    for kills in (0, KILLS):
        chance, killed = random.Random(SEED), list[int]()
        with nodes_apart(digits, tmp_path / str(kills), 3, 1, *words) as (_, nodes):
            for node in nodes:
                node.start()
            for _ in range(kills):
                victim = nodes[1 + chance.randrange(2)]  # the first one lives through all of it
                at = nodes[0].step + 40 + chance.randrange(80)
                nodes[0].wait_for_step(min(at, 1500), seconds=300)
                victim.kill()
                killed.append(victim.number)
                time.sleep(chance.uniform(0, 8))
                victim.start()
            for node in nodes:
                if node.number not in killed:
                    node.finish(seconds=600)
                    last = records(node.run_dir)[-1]
                    assert last["step"] == 1600 and last["restarts"] == 0
                    top1[kills] = last["eval_top1"]
    print(f"\nseed {SEED}: killed nodes {killed}; top-1 {top1[KILLS]:.4f}, undisturbed {top1[0]:.4f}")
    assert top1[KILLS] > 0.95 and abs(top1[KILLS] - top1[0]) <= 0.01
