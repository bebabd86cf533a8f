from __future__ import annotations

import pytest

from lte_scale.topology import Topology, from_environment


@pytest.mark.parametrize("heads_per_node", [1, 2, 4, 8, 12])
def test_every_head_has_its_ranks_and_every_rank_its_heads(heads_per_node: int) -> None:
    places = [Topology(nodes=3, ranks_per_node=4, heads_per_node=heads_per_node, rank=r) for r in range(12)]
    owners: dict[int, list[int]] = {}
    for place in places:
        for head in place.my_heads:
            owners.setdefault(head, []).append(place.rank)
    assert sorted(owners) == list(range(3 * heads_per_node))
    for head, ranks in owners.items():
        assert len(ranks) == places[0].ranks_per_head
        assert {places[r].node for r in ranks} == {head // heads_per_node}
        assert [places[r].head_member for r in ranks] == list(range(len(ranks)))


def test_peers_share_a_local_rank_and_nodes_partition_the_world() -> None:
    topology = Topology(nodes=3, ranks_per_node=4, heads_per_node=4, rank=6)
    assert (topology.node, topology.local_rank) == (1, 2)
    assert topology.peer_ranks(2) == [2, 6, 10]
    assert topology.node_ranks(1) == [4, 5, 6, 7]
    assert Topology(ranks_per_node=4, heads_per_node=2).head_ranks(0, 1) == [2, 3]


@pytest.mark.parametrize("heads", [0, 3, 5, 6])
def test_heads_that_do_not_divide_are_refused_with_what_would(heads: int) -> None:
    with pytest.raises(ValueError, match=r"use one of 1, 2, 4 or a multiple of 4"):
        Topology(nodes=2, ranks_per_node=4, heads_per_node=heads)


def test_environment() -> None:
    environ = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}
    assert from_environment(0, environ) == Topology(nodes=2, ranks_per_node=2, heads_per_node=2, rank=3)
    assert from_environment(0, {}) == Topology()
    with pytest.raises(ValueError, match="same number of ranks"):
        from_environment(0, {"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "RANK": "0"})


def test_environment_of_deepspeeds_launcher() -> None:
    environ = {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
    }
    assert from_environment(0, environ) == Topology(nodes=2, ranks_per_node=2, heads_per_node=2, rank=3)
    # What torchrun sets for its own ranks holds, wherever it was started.
    nested = {**environ, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert from_environment(0, nested) == Topology(ranks_per_node=8, heads_per_node=8, rank=3)
    assert from_environment(0, {"LOCAL_SIZE": "2"}) == Topology()


@pytest.mark.parametrize("local", ["1", "3"])
def test_nodes_with_unequal_slots_are_refused_on_every_node(local: str) -> None:
    with pytest.raises(ValueError, match=rf"WORLD_SIZE=4 is not 2 nodes of LOCAL_SIZE={local}: every node must run"):
        from_environment(0, {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_SIZE": local, "CROSS_SIZE": "2"})
