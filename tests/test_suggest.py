"""`plan --suggest`: what it suggests is allowed and enough, and nothing of less loss is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from lte_scale.cli import main
from lte_scale.config import load_config
from lte_scale.config.schema import Config, ConfigError
from lte_scale.estimate import Traces
from lte_scale.link import Link, lte_demand, predict
from lte_scale.suggest import BOUND, LONGEST, PRECISIONS, SOON, Suggestion, suggest

MODEL = [
    "model.image_size=28",
    "model.channels=1",
    "model.num_classes=7",
    "model.arguments={patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}",
    "adapters.rank=4",
    "train.batch_size=8",
    "merge.every=12",
]
STEP = 0.02


def config(*overrides: str) -> Config:
    return load_config(None, [*MODEL, *overrides])


@pytest.fixture(scope="module")
def traces() -> Traces:
    return Traces(config())


def suggested(traces: Traces, asked: Config, gbit: float, nodes: int = 2) -> Suggestion:
    return suggest(asked, traces, nodes=nodes, ranks_per_node=2, gbit=gbit, step_seconds=STEP)


def waits(traces: Traces, asked: Config, gbit: float, nodes: int = 2) -> float:
    """The share that `plan` predicts for a configuration."""
    demand = lte_demand(traces.arrangement(asked, nodes=nodes, ranks_per_node=2))
    merge = asked.merge
    found = predict(demand, Link(gbit), step_seconds=STEP, delay=merge.delay, fragments=merge.fragments).stall_share
    assert found is not None
    return found


def loss(c: Config, every: int) -> tuple[float, ...]:
    """How much is given up: the order of preference."""
    merge = c.merge
    late = max(0.0, merge.delay - SOON * merge.every)
    return merge.every // every, PRECISIONS.index(merge.precision), late, merge.fragments, merge.delay


def everything(*overrides: str, every: int, longest: int) -> Iterator[Config]:
    """All that may be suggested, with windows of at most `longest`."""
    for window in range(every, longest + 1, every):
        for precision in PRECISIONS:
            for fragments in (n for n in range(1, 11) if window % n == 0):
                for delay in range(window):
                    merge = [f"merge.every={window}", f"merge.precision={precision}"]
                    merge += [f"merge.fragments={fragments}", f"merge.delay={delay}"]
                    try:
                        yield config(*overrides, *merge)
                    except ConfigError:
                        break


GBIT = [0.1, 0.02, 0.01, 0.004, 0.002, 0.001, 0.0006, 0.0003]
"""From one that needs a step or so for an exchange to one on which no window is long enough."""


@pytest.mark.parametrize("overrides", [(), ("merge.local_every=4",), ("merge.precision=bf16",)])
def test_it_is_enough_and_nothing_of_less_loss_is(traces: Traces, overrides: tuple[str, ...]) -> None:
    least = PRECISIONS.index(config(*overrides).merge.precision)
    candidates = [
        c for c in everything(*overrides, every=12, longest=24) if PRECISIONS.index(c.merge.precision) >= least
    ]
    seen = set()
    for gbit in GBIT:
        asked = config(*overrides)
        found = suggested(traces, asked, gbit)
        enough = [loss(c, 12) for c in candidates if waits(traces, c, gbit) < BOUND]
        if not found.enough:
            assert not enough
            continue
        chosen = config(*overrides, *found.overrides)
        assert waits(traces, chosen, gbit) == pytest.approx(found.stall_share)
        assert found.stall_share < BOUND
        assert len(found.reasons) == len(found.overrides)
        if not found.overrides:
            assert waits(traces, asked, gbit) < BOUND
        elif chosen.merge.every <= 24:
            assert loss(chosen, 12) == min(enough)
        else:
            assert not enough
        seen.add(loss(chosen, 12)[:2])
    assert len(seen) >= 3  # precisions and windows


def test_a_faster_link_never_asks_for_more(traces: Traces) -> None:
    found = [suggested(traces, config(), gbit) for gbit in sorted(GBIT)]
    known = [loss(config(*f.overrides), 12)[:3] for f in found if f.enough]
    assert len(known) >= 4
    assert all(slow >= fast for slow, fast in pairwise(known))
    assert [f.enough for f in found] == sorted(f.enough for f in found)


def test_with_one_base_over_all_nodes_nothing_is_delayed(traces: Traces) -> None:
    asked = config("base.scope=global", "base.gather=node")
    for gbit in (0.2, 0.1, 0.02):
        found = suggested(traces, asked, gbit)
        assert found.overrides
        assert not any("delay" in override for override in found.overrides)
        assert waits(traces, config("base.scope=global", "base.gather=node", *found.overrides), gbit) < BOUND


@pytest.mark.parametrize(
    ("overrides", "remedy"), [(["base.scope=global"], "base.gather=node"), (["method=full"], "method=lte")]
)
def test_what_every_step_sends_is_no_matter_of_merges(overrides: list[str], remedy: str) -> None:
    found = suggested(Traces(config(*overrides)), config(*overrides), 0.001)
    assert not found.enough
    assert remedy in found.reasons[0]


def test_one_node_waits_for_nobody(traces: Traces) -> None:
    found = suggested(traces, config(), 0.001, nodes=1)
    assert (found.overrides, found.stall_share) == ((), 0)


def test_no_window_is_long_enough(traces: Traces) -> None:
    found = suggested(traces, config(), 1e-5)
    assert not found.enough
    chosen = config(*found.overrides)
    assert waits(traces, chosen, 1e-5) == pytest.approx(found.stall_share)
    assert all(found.stall_share <= waits(traces, c, 1e-5) for c in everything(every=12, longest=24))
    assert f"{12 * LONGEST}" in found.reasons[0] and "int4" in found.reasons[0]


FILE = """
model: {name: vit_tiny_patch16_224, num_classes: 7, image_size: 28, channels: 1,
        arguments: {patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}}
train: {batch_size: 8}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., int]:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return lambda *options: main(["plan", str(path), "--nodes", "2", "--ranks-per-node", "2", *options])


def test_the_overrides_can_be_pasted(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    link = ("--link-gbit", "0.0005", "--step-seconds", "0.02")
    assert plan(*link, "--suggest") == 0
    page = capsys.readouterr().out.splitlines()
    line = next(index for index, text in enumerate(page) if text.startswith("Steps wait")) + 1
    overrides = page[line].split()
    assert len(overrides) > 1
    assert plan(*link, "--suggest", "--json", *overrides) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["link"]["methods"][0]["stall_share"] == found["suggestion"]["stall_share"] < BOUND
    assert found["suggestion"]["overrides"] == []


@pytest.mark.parametrize("options", [["--suggest"], ["--suggest", "--link-gbit", "1"]])
def test_the_command_refuses_in_one_line(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert plan(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("lte-scale: --suggest: ")
    assert error.count("\n") == 1
