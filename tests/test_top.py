"""`lte-scale top`: the lines it makes of what endpoints say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lte_scale.metrics.catalogue import METRICS
from lte_scale.top.figures import duration, size
from lte_scale.top.node import Reading
from lte_scale.top.scrape import read
from lte_scale.top.view import lines

ROOT = Path(__file__).parent.parent
NOW = 1_700_000_000.0

Values = dict[str, float]
SECONDS = {"data_wait": 0.01, "forward": 0.05, "backward": 0.1, "collectives": 0.01, "optimizer": 0.01, "merge": 0.02}
INFO = 'run="demo",model="vit_small",engine="fsdp",base_scope="node",rank="16",merge_every="50",heads="4"'
INTER_NODE = 'lte_network_bytes_total{scope="inter_node",purpose="merge_factor"}'


def page(node: int, steps: int, changed: Values) -> str:
    """What a node of two ranks says after some steps of 0.2 s; `changed` sets the values of series."""
    first, second = 2 * node, 2 * node + 1
    values: Values = {
        f"lte_config_info{{{INFO}}}": 1,
        "lte_start_timestamp_seconds": NOW - 100, "lte_step": 1000 + steps, "lte_planned_steps": 2200,
        "lte_remaining_seconds": 3725, "lte_images_per_second": 640, "lte_steps_total": steps,
        "lte_images_total": 128 * steps, INTER_NODE: 1.28e6 * steps,
        'lte_network_bytes_total{scope="intra_node",purpose="base"}': 1e12, "lte_mfu_ratio": 0.415,
        "lte_step_seconds_sum": 0.2 * steps, "lte_step_seconds_count": steps,
        'lte_memory_bytes{local_rank="0",kind="peak"}': 10e9, 'lte_memory_bytes{local_rank="1",kind="peak"}': 12.34e9,
        'lte_memory_bytes{local_rank="1",kind="reserved"}': 99e9, "lte_learning_rate": 1e-3,
        f'lte_loss{{head="{first}"}}': 2.0, f'lte_loss{{head="{second}"}}': 2.5,
        f'lte_top1_ratio{{head="{first}"}}': 0.5, "lte_bad_samples_total": 0, "lte_bad_shards_total": 0,
        f'lte_skipped_steps_total{{head="{first}"}}': 0, 'lte_checkpoints_total{result="failed"}': 0,
        "lte_checkpoint_timestamp_seconds": NOW - 70,
    }  # fmt: skip
    for rank in (0, 1):
        values[f'lte_rank_step{{local_rank="{rank}"}}'] = 1000 + steps
        values[f'lte_rank_step_timestamp_seconds{{local_rank="{rank}"}}'] = NOW - 1
        for name, seconds in SECONDS.items():
            values[phase(name, rank)] = seconds * steps
    unknown = [key for key in changed if key.partition("{")[0] not in named_metrics()]
    assert not unknown
    values |= changed
    return "".join(f"{labelled(key, node)} {value}\n" for key, value in values.items())


def named_metrics() -> set[str]:
    """Those of the catalogue, as an endpoint names them."""
    histograms = [name for name, metric in METRICS.items() if metric.kind == "histogram"]
    return {*METRICS, *(name + end for name in histograms for end in ("_sum", "_count"))}


def labelled(series: str, node: int) -> str:
    name, _, rest = series.partition("{")
    return f'{name}{{node="{node}",{rest or "}"}'


def reading(node: int, changed: Values | None = None, *, steps: int = 100, before: int = 0) -> Reading:
    earlier = read(page(node, before, {}), NOW - 20) if before else None
    return Reading(f"host{node}:9464", read(page(node, steps, changed or {}), NOW), earlier)


def phase(name: str, rank: int = 0) -> str:
    return f'lte_rank_phase_seconds_total{{local_rank="{rank}",phase="{name}"}}'


def marked(shown: list[str]) -> list[str]:
    """The lines of problems."""
    return [line for line in shown if line.startswith("!")]


def test_every_metric_shown_is_in_the_catalogue() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "lte_scale" / "top").glob("*.py"))
    asked = set(re.findall(r"[\"'](lte_[a-z0-9_]+)[\"']", sources))
    assert len(asked) >= 28
    assert not asked - named_metrics()


def test_a_run_of_two_nodes() -> None:
    slow = {phase("backward", rank): 14.0 for rank in (0, 1)}
    assert lines([reading(1, slow), reading(0)], 140) == [
        "demo  vit_small  engine fsdp, base node, rank 16, 4 heads, merge every 50",
        "step 1,100/2,200 [###############---------------] 50.0 %  left 1:02:05",
        "loss 2.250  top-1 50.0 %  held-out top-1 -  lr 1.00e-03  images/s 1,280",
        "",
        "node  images/s  step ms   data   merge  fwd+bwd     MFU     peak  sent/s  sent/image  skipped  bad  last step"
        "  checkpoint",
        "0          640    200.0  5.0 %  10.0 %   75.0 %  41.5 %  12.3 GB  6.4 MB     10.0 kB        0    0        1 s"
        "        1:10",
        "1 *        640    200.0  4.2 %   8.3 %   79.2 %  41.5 %  12.3 GB  6.4 MB     10.0 kB        0    0        1 s"
        "        1:10",
        "",
        "* node 1 is the slowest: 210.0 ms a step of its own work, the fastest takes 170.0 ms",
    ]


def test_narrow_terminals_lose_the_least_important_columns() -> None:
    readings = [reading(0), reading(1, {"lte_bad_samples_total": 7}), Reading("host2:9464", reason="timed out")]
    for width in (40, 60, 80, 100, 200):
        shown = lines(readings, width)
        assert max(map(len, shown)) <= width
    narrow = [line for line in lines(readings, 80) if line.startswith(("node", "0"))]
    assert narrow == [
        "node  images/s  step ms   data   merge  fwd+bwd     MFU  sent/image  last step",
        "0          640    200.0  5.0 %  10.0 %   75.0 %  41.5 %     10.0 kB        1 s",
    ]


def test_many_nodes_in_a_low_terminal() -> None:
    readings = [reading(node, {phase("backward"): 10.0 + node % 30}) for node in range(40)]
    shown = lines(readings, 80, 16)
    assert len(shown) <= 16
    assert [line.split()[0] for line in shown[5:8]] == ["29", "28", "27"]
    assert "... and 33 nodes more; those above are the slowest" in shown
    assert len(lines(readings, 80, 3)) == 3


def test_a_run_that_has_just_begun() -> None:
    now = read(labelled("lte_start_timestamp_seconds", 0) + f" {NOW}\n", NOW)
    assert lines([Reading("host:1", now)], 80) == [
        "no step ended yet",
        "loss -  top-1 -  held-out top-1 -  lr -  images/s -",
        "",
        "node      images/s  step ms  data  merge  fwd+bwd  MFU  sent/image  last step",
        "host:1           -        -     -      -        -    -           -          -",
    ]


def test_a_mark_needs_a_difference() -> None:
    assert not [line for line in lines([reading(0), reading(1)], 80) if "slowest" in line]


def test_heads() -> None:
    health: Values = {
        "lte_head_cosine_mean": 0.125, "lte_head_cosine_max": 0.3, "lte_merged_delta_effective_rank": 40.0,
        "lte_merged_delta_rank_ratio": 0.6, 'lte_head_delta_norm{head="0"}': 1.5, 'lte_head_delta_norm{head="1"}': 2.5,
    }  # fmt: skip
    assert lines([reading(0, health)], 200)[-1] == (
        "heads: cosine 0.125  (max 0.300)  effective rank 40.0  (60.0 % of the highest)  delta norm 1.5 to 2.5"
    )


def row(reading: Reading) -> dict[str, str]:
    """The cells of a node, by title."""
    titles, cells = (re.split(r"  +", line) for line in lines([reading], 200) if line.startswith(("node", "0 ")))
    return dict(zip(titles, cells, strict=True))


def test_times_and_bytes_are_of_the_last_steps() -> None:
    """As many seconds of waiting in steps 50 to 100 as in all of them."""
    waited = {phase("data_wait", rank): 0.5 + 5.0 for rank in (0, 1)}
    assert row(reading(0, waited, before=50))["data"] == "34.5 %"
    assert row(reading(0, waited))["data"] == "22.4 %"
    sent: Values = {INTER_NODE: 1.28e8}
    assert row(reading(0, sent, before=50))["sent/image"] == "10.0 kB"


def test_a_node_without_a_new_step_has_its_averages_since_the_start() -> None:
    assert row(reading(0, before=100)) == row(reading(0))


def test_a_process_that_began_anew_counts_from_zero() -> None:
    """Whether its start says so or its counters do."""
    anew: Values = {"lte_start_timestamp_seconds": NOW - 5}
    assert row(reading(0, anew, before=90)) == row(reading(0))
    before, after = (read(page(0, steps, {}), NOW) for steps in (100, 30))
    assert after.since(before).total("lte_steps_total") == 30


def test_problems() -> None:
    wrong: Values = {
        'lte_loss{head="0"}': float("nan"), 'lte_loss{head="11"}': float("inf"), 'lte_loss{head="2"}': float("nan"),
        'lte_skipped_steps_total{head="0"}': 3, "lte_bad_samples_total": 12, "lte_bad_shards_total": 1,
        'lte_checkpoints_total{result="failed"}': 2, phase("data_wait", 1): 40.0,
    }  # fmt: skip
    readings = [reading(0, wrong), reading(1), Reading("host2:9464", reason="Connection refused")]
    assert marked(lines(readings, 200)) == [
        "! host2:9464: no answer: Connection refused",
        "! node 0: the loss of head 0, 2, 11 is not finite",
        "! node 0: steps skipped for a loss or gradient that is not finite: 3 of head 0",
        "! node 0: damaged data skipped: samples 12, whole shards 1",
        "! node 0: checkpoints that failed: 2; the reason is in the run's events.log",
        "! node 0: waits for data 51.9 % of its time: raise data.workers, or use faster storage",
    ]
    assert lines(readings, 200)[2].startswith("loss 2.333 ")  # of those that have one
    assert not marked(lines([reading(0), reading(1)], 200))


def silent(rank: int, step: int, seconds: float) -> Values:
    return {
        f'lte_rank_step{{local_rank="{rank}"}}': step,
        f'lte_rank_step_timestamp_seconds{{local_rank="{rank}"}}': NOW - seconds,
    }


@pytest.mark.parametrize(
    ("silences", "said"),
    [
        (
            silent(1, 1099, 250) | silent(0, 1100, 249),
            ["node 0: rank 1", "4:10, at step 1,099 where others have ended"],
        ),
        (silent(1, 1100, 250) | silent(0, 1100, 250), ["node 0: rank 0, 1", "4:10, at step 1,100 like all others"]),
        (silent(1, 2200, 250) | silent(0, 2200, 250), []),
        (silent(1, 1099, 50), []),
    ],
    ids=["one behind", "all alike", "run has ended", "not for long"],
)
def test_ranks_that_have_ended_no_step_for_long(silences: Values, said: list[str]) -> None:
    found = marked(lines([reading(0, silences)], 200))
    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)


def test_slow_steps_are_not_silence() -> None:
    slow: Values = silent(0, 1100, 250) | silent(1, 1100, 250) | {"lte_step_seconds_sum": 2600.0}
    assert not marked(lines([reading(0, slow)], 200))


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (245, "4:05"), (11045, "3:04:05"), (183900, "2 d 03:05"), (float("inf"), "?")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(x) for x in (None, 0, 999, 1000, 999_949, 999_951, 3e9, 2e15)] == [
        "-", "0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "3.0 GB", "2000.0 TB",
    ]  # fmt: skip
