"""Nodes that are jobs of their own: they merge with those that are there, and outlive one another."""

from __future__ import annotations

from pathlib import Path

import torch

from lte_scale.run_dir import whole_checkpoints
from tests.apart import Node, nodes_apart
from tests.test_train import SMALL, command, finish, start, tensors

RUN = [*SMALL, "engine=fsdp", "merge={every: 8, local_every: 4, outer: nesterov}", "data.workers=0"]


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


def test_equals_one_job(digits: Path, tmp_path: Path) -> None:
    """Two nodes of two ranks, two levels, Nesterov: the masters of all nodes bit for bit; those of one job to 1e-5."""
    words = [*RUN, "train.duration=32", "train.ema_decay=0.9", "evaluate.every=32", "checkpoint.every=32"]
    with nodes_apart(digits, tmp_path, 2, 2, *words) as (_, nodes):
        for node in nodes:
            node.start()
        for node in nodes:
            node.finish()
            assert "merging with 2 of 2 nodes" in node.events
        assert_equal(nodes)
    whole = tmp_path / "whole"
    finish(start(command(digits, whole, *words, "merge.path=dense")))
    ours, theirs = masters(nodes[0]), masters(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-5, atol=1e-5 * float(theirs[name].abs().max()), msg=name
        )
