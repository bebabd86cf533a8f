"""The time on the link between nodes, against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lte_scale.arrangement import Arrangement
from lte_scale.baselines import FullRank
from lte_scale.cli import main
from lte_scale.config.schema import AdaptersConfig, BaseConfig, Config, MergeConfig, TrainConfig
from lte_scale.cost import Layer, Shapes
from lte_scale.link import (
    Demand,
    Link,
    dense_from,
    forecast,
    full_rank_demands,
    gigabits,
    hiding_delay,
    longest_delay,
    lte_demand,
    predict,
)
from lte_scale.topology import Topology
from lte_scale.traffic import by_scope, of_node, window_traffic

LAYER = Layer(64, 32, 2)  # A of 64 values, B of 128, W of 2048
EXCHANGE = Demand("LTE", 0, 95e6, every=50)  # 0.8 Gbit on a link, headers included
MODEL = FullRank(
    values=1000, blocks=(800,), activations=0, autocast_activations=0, compute_bytes=2, accumulate=1, every=10,
    moving_average=False, bucket_bytes=1,
)  # fmt: skip


def arrangement(
    nodes: int = 4, *, scope: str = "node", gather: str = "pass", mode: str = "reset", **merge: Any
) -> Arrangement:
    config = Config(
        adapters=AdaptersConfig(mode=mode),
        base=BaseConfig(scope=scope, gather=gather),
        merge=MergeConfig(**{"every": 10, **merge}),
        train=TrainConfig(precision="fp32"),
    )
    topology = Topology(nodes=nodes, ranks_per_node=2, heads_per_node=2)
    return Arrangement(Shapes({"a": LAYER}, 10), topology, config)


def test_a_link_carries_headers_too() -> None:
    assert gigabits(95e6) == pytest.approx(0.8)
    assert Link(10).seconds(95e6) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("delay", "fragments", "stall"),
    [(0, 1, 0.8), (3, 1, 0.5), (8, 1, 0.0), (0, 4, 0.8), (1, 4, 0.4), (2, 4, 0.0)],
)
def test_steps_wait_for_what_the_delay_does_not_hide(delay: int, fragments: int, stall: float) -> None:
    found = predict(EXCHANGE, Link(1), step_seconds=0.1, delay=delay, fragments=fragments)
    assert found.link_seconds == pytest.approx(0.8)
    assert found.average_gbit == pytest.approx(0.8 / 5)
    assert found.stall_seconds == pytest.approx(stall)
    assert found.stall_share == pytest.approx(stall / 5)


def test_the_rate_that_hides_an_exchange() -> None:
    peaks = [
        predict(EXCHANGE, Link(1), step_seconds=0.1, delay=delay, fragments=fragments).peak_gbit
        for delay, fragments in ((0, 1), (4, 1), (4, 2))
    ]
    assert peaks == [None, pytest.approx(2.0), pytest.approx(1.0)]
    assert predict(Demand("DDP", 95e6, 0, every=50), Link(1), step_seconds=0.1).peak_gbit == pytest.approx(8.0)


def test_the_smallest_delay_that_hides_an_exchange() -> None:
    assert hiding_delay(EXCHANGE, Link(1), step_seconds=0.1) == 8
    assert hiding_delay(EXCHANGE, Link(1), step_seconds=0.1, fragments=4) == 2
    assert hiding_delay(EXCHANGE, Link(1), step_seconds=0.11) == 8
    assert hiding_delay(Demand("one node", 0, 0, every=50), Link(1), step_seconds=0.1) == 0


def test_bytes_of_every_step_hide_under_that_step_at_best() -> None:
    found = predict(Demand("DDP", 95e6, 0, every=50), Link(1), step_seconds=0.3)
    assert found.link_seconds == pytest.approx(0.8)  # of a step
    assert found.window_bytes == 50 * 95e6
    assert found.stall_seconds == pytest.approx(50 * 0.5)
    assert predict(Demand("DDP", 95e6, 0, every=50), Link(10), step_seconds=0.3).stall_seconds == 0
    assert predict(Demand("both", 95e6, 95e6, every=50), Link(1), step_seconds=0.3).stall_seconds == pytest.approx(25.8)


def test_fragments_are_runs_of_whole_layers_and_wait_by_their_own_size() -> None:
    uneven = replace(arrangement(fragments=2), shapes=Shapes({"a": LAYER, "b": LAYER, "c": LAYER}, 10))
    demand = lte_demand(uneven)
    assert sum(demand.parts) == demand.exchange_bytes
    assert demand.exchange_bytes == lte_demand(replace(uneven, config=arrangement().config)).exchange_bytes
    large, small = sorted(demand.parts, reverse=True)
    assert large > 1.5 * small
    link = Link(8e-9 * large / 0.95)  # a second for the larger one
    found = predict(demand, link, step_seconds=0.25, delay=3, fragments=2)
    assert found.stall_seconds == pytest.approx(0.25)  # in halves it would be nothing
    assert hiding_delay(demand, link, step_seconds=0.25, fragments=2) == 4


def test_without_a_step_time_there_are_bytes_and_seconds_alone() -> None:
    found = predict(EXCHANGE, Link(1))
    assert found.link_seconds == pytest.approx(0.8)
    assert (found.average_gbit, found.peak_gbit, found.stall_seconds, found.stall_share) == (None,) * 4


@pytest.mark.parametrize(("path", "of_weight"), [("factor", 3 * 2 * 4 * (64 + 128)), ("dense", 2 * 3 * 4 * 2048 // 4)])
def test_what_lte_sends(path: str, of_weight: int) -> None:
    demand = lte_demand(arrangement(path=path))
    replicas = 2 * (2 * 3 * 4 * 5 // 4)  # each rank of the node five of the ten values
    fingerprints = 2 * 3 * 8
    assert demand == Demand("LTE", 0, of_weight + replicas + fingerprints, every=10)


def test_one_base_over_all_nodes_crosses_the_link_in_every_step() -> None:
    demand = lte_demand(arrangement(scope="global"))
    assert demand.step_bytes == 2 * 7 * 4 * 2048 // 8  # twice a gather of fp32 weights from 8 ranks; one crosses
    assert longest_delay(arrangement(scope="global")) == 0


def test_what_full_rank_training_sends() -> None:
    ddp, fsdp, diloco = full_rank_demands(MODEL, arrangement())
    assert ddp == Demand("full-rank DDP", 2 * 7 * 2 * 1000 // 8, 0, every=10)
    assert fsdp == Demand("full-rank FSDP", 2 * 7 * 2 * 1000 // 8 + 7 * 2 * 1000 // 8, 0, every=10)
    assert diloco == Demand("full-rank DiLoCo", 0, 2 * (2 * 3 * 4 * 500 // 4), every=10)


def test_room_for_a_delay() -> None:
    assert longest_delay(arrangement()) == 9
    assert longest_delay(arrangement(fragments=2)) == 4
    assert longest_delay(arrangement(local_every=2)) == 1


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({}, 11),  # 2 * 4 * 2048 / (2 * 4 * 192) = 10.7
        ({"local_every": 2}, 3),  # five merges in a window: 2.1
        ({"local_every": 2, "mode": "resetless"}, 11),  # of which one set of factors is sent
        ({"precision": "int8"}, 11),  # 2 * (2048 + 64) / (2 * (64 + 2 + 128 + 4)) = 10.7
        ({"precision": "int4"}, 9),  # 2 * (1024 + 64) / (2 * (64 + 2 + 64 + 4)) = 8.1
        ({"scope": "global"}, 6),  # a reduce-scatter: half of the first
    ],
)
def test_where_the_dense_path_becomes_cheaper(options: dict[str, Any], nodes: int) -> None:
    assert dense_from(arrangement(nodes=1, **options), LAYER) == nodes
    assert arrangement(nodes=nodes - 1, **options).paths == {"a": "factor"}
    assert arrangement(nodes=nodes, **options).paths == {"a": "dense"}


@pytest.mark.parametrize(("precision", "values"), [("fp32", 4 << 20), ("int8", (1 << 20) + (1 << 15))])
def test_no_number_of_nodes_sends_more_than_twice_the_weight(precision: str, values: int) -> None:
    """The bytes of a node grow up to the crossing; beyond it they are the dense path's, 2 (K - 1) / K of the weight."""
    weight = Layer(1024, 1024, 16)
    small = arrangement(precision=precision)
    a = replace(small, shapes=Shapes({"a": weight}, 10))
    crossing = dense_from(a, weight)
    assert 8 < crossing < 64
    sent = {}
    for nodes in (2, 4, 8, crossing, 64, 512):
        fingerprints = 2 * (nodes - 1) * 8
        sent[nodes] = lte_demand(replace(a, topology=replace(a.topology, nodes=nodes))).exchange_bytes - fingerprints
    replicas = 2 * 512 * (2 + 2) * 2  # at most: for each node a value and its scale, twice, from two ranks
    assert sent[8] > 3 * sent[2]
    assert max(sent.values()) < 2 * values + replicas
    assert sent[512] < 2 * values * crossing / (crossing - 1) * 511 / 512 + replicas


def test_a_forecast_holds_lte_against_the_others() -> None:
    found = forecast(arrangement(), MODEL, gbit=1e-5, step_seconds=1.0)
    assert [row.name for row in found.methods] == ["LTE", "full-rank DDP", "full-rank FSDP", "full-rank DiLoCo"]
    assert found.hiding_delay == 4  # (4608 + 60) bytes are 3.93 s
    assert found.longest_delay == 9
    assert forecast(arrangement(), MODEL, gbit=1).hiding_delay is None
    late = forecast(arrangement(delay=4), replace(MODEL, every=10), gbit=1e-5, step_seconds=1.0)
    assert late.methods[0].stall_seconds == 0
    assert late.methods[3].stall_seconds == pytest.approx(6000 * 8 / 0.95 / 1e4 - 4)


CONFIG = """
model: {name: vit_tiny_patch16_224, num_classes: 7, image_size: 28, channels: 1,
        arguments: {patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}}
train: {batch_size: 8}
"""


def plan(tmp_path: Path, *options: str) -> int:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return main(["plan", str(path), "--nodes", "2", "--ranks-per-node", "2", *options])


def test_the_command_prints_what_it_puts_into_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--link-gbit", "0.1", "--step-seconds", "0.02"]
    assert plan(tmp_path, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    lte = found["link"]["methods"][0]
    merge = sum(found["bytes_sent_per_node"]["global_merge"]["inter_node"].values())
    assert lte["exchange_bytes"] == merge
    assert lte["link_seconds"] == pytest.approx(8e-8 * merge / 0.95)
    assert all(row["dense_from"] >= 2 for row in found["paths"])
    assert plan(tmp_path, *options) == 0
    page = capsys.readouterr().out
    assert "On links of 0.1 Gbit/s" in page
    assert f"a delay of {found['link']['hiding_delay']} hides" in page
    assert max(map(len, page.splitlines())) <= 120


def test_without_a_link_nothing_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path, "--json") == 0
    assert "link" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ["--link-gbit", "0"],
        ["--link-gbit", "-1"],
        ["--link-gbit", "nan"],
        ["--link-gbit", "inf"],
        ["--step-seconds", "0", "--link-gbit", "1"],
        ["--step-seconds", "1"],
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert plan(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lte-scale: {options[0]}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("merge", [{}, {"delay": 3}, {"delay": 4, "local_every": 5}, {"fragments": 2, "delay": 1}])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_a_window_sends_what_its_exchanges_do(mode: str, merge: dict[str, Any]) -> None:
    """Also where its last exchange lands in the next window, as that of the window before does in this one."""
    a = arrangement(mode=mode, **merge)
    a = replace(a, shapes=Shapes({"a": LAYER, "b": LAYER}, 10))
    assert by_scope(of_node(a, window_traffic))["inter_node"] == lte_demand(a).window_bytes > 0
