"""When what part of the model is merged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_scale.cadence import Cadence
from lte_scale.config import load_config
from lte_scale.config.schema import ConfigError


def test_three_fragments_take_turns() -> None:
    c = Cadence(every=12, local_every=12, fragments=3, delay=2)
    assert {s: c.departs(s) for s in range(25) if c.departs(s) is not None} == {4: 1, 8: 2, 12: 0, 16: 1, 20: 2, 24: 0}
    assert {s: c.lands(s) for s in range(25) if c.lands(s) is not None} == {6: 1, 10: 2, 14: 0, 18: 1, 22: 2}
    assert [s for s in range(1, 13) if c.due(s)] == [4, 6, 8, 10, 12]
    assert [s for s in range(1, 13) if c.under_way(s)] == [4, 5, 8, 9, 12]
    assert [c.at_rest(s) for s in range(1, 9)] == [1, 2, 3, 6, 6, 6, 7, 10]
    assert c.sets_sent(12) == {0: 1}
    assert c.sets_sent(24, last=True) == {0: 1, 1: 1, 2: 1}


def test_local_merges_since_the_last_global_one() -> None:
    c = Cadence(every=12, local_every=2, fragments=3, delay=1)
    assert [c.sets_sent(s) for s in (4, 8, 12, 16)] == [{1: 2}, {2: 4}, {0: 6}, {1: 6}]
    assert c.sets_sent(24, last=True) == {0: 6, 1: 4, 2: 2}


def test_regions_merge_between_the_merges_of_all() -> None:
    c = Cadence(every=12, local_every=2, fragments=2, region_every=6)
    assert [s for s in range(1, 25) if c.is_regional(s)] == [6, 12, 18, 24]
    assert [s for s in range(1, 25) if c.is_regional(s) and not c.is_local(s)] == []
    assert {s: c.departs(s) for s in range(25) if c.departs(s) is not None} == {6: 1, 12: 0, 18: 1, 24: 0}
    grown = Cadence(every=12, local_every=2, growth=0.5, region_every=4)
    assert (grown.grown, [s for s in range(1, 39) if grown.is_regional(s)]) == (26, [12, 16, 22, 26, 30, 34, 38])


@st.composite
def cadences(draw: st.DrawFn) -> Cadence:
    local, between, fragments = (draw(st.integers(1, n)) for n in (6, 4, 4))
    apart = local * between
    every = apart * fragments
    local = draw(st.sampled_from([local, every]))
    growth = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    region = draw(st.sampled_from([0, apart])) if local < apart < every else 0
    return Cadence(every, local, fragments, draw(st.integers(0, min(local, apart) - 1)), growth, region)


@given(cadences(), st.integers(1, 5))
def test_every_fragment_once_a_window_and_no_two_at_a_time(c: Cadence, windows: int) -> None:
    steps = range(1, c.grown + windows * c.every + 1)
    departures = [c.departs(step) for step in steps if step > c.grown]
    assert [departures.count(f) for f in range(c.fragments)] == [windows] * c.fragments
    under_way: int | None = None
    merges = dict.fromkeys(range(c.fragments), 0)  # of the heads of a fragment since its last departure
    for step in steps:
        landed, departed = c.lands(step), c.departs(step)
        if c.takes_time(step) and landed is not None:
            assert under_way == landed
            under_way = None
        for fragment in merges:
            merges[fragment] += c.is_local(step) or fragment == departed or (departed == 0 and step <= c.grown)
        if departed is not None:
            assert under_way is None
            departing = range(c.fragments) if step <= c.grown else [departed]
            assert c.sets_sent(step) == {fragment: merges[fragment] for fragment in departing}
            merges |= dict.fromkeys(departing, 0)
            under_way = departed if c.takes_time(step) else None
        assert c.under_way(step) == (under_way is not None)
        assert not (under_way is not None and departed is None and c.is_local(step))
        assert c.is_local(step) or not c.is_regional(step)
        assert c.due(step) == (departed is not None or landed is not None or c.is_local(step))
        assert not c.under_way(c.at_rest(step))


def test_windows_grow_with_the_steps_behind_them() -> None:
    c = Cadence(every=6, local_every=6, growth=0.5)
    assert [s for s in range(1, 32) if c.due(s)] == [1, 2, 3, 4, 6, 9, 13, 19, 25, 31]
    assert [list(c.covered(s)) for s in (1, 6, 13, 19)] == [[1], [5, 6], [10, 11, 12, 13], [14, 15, 16, 17, 18, 19]]


@given(cadences())
def test_windows_are_no_longer_than_their_share_of_what_is_behind_them(c: Cadence) -> None:
    """Covered by one merge each, none longer than that, in whole local windows as soon as one fits."""
    ends = [step for step in range(1, c.grown + 3 * c.every + 1) if c.departs(step) == 0]
    behind = 0
    for end in ends:
        length, allowed = end - behind, max(1, min(c.every, int(c.growth * behind) if c.growth else c.every))
        assert length == (allowed if allowed < c.local_every else allowed - allowed % c.local_every)
        assert {c.window_end(step) for step in range(behind + 1, end + 1)} == {end}
        assert list(c.covered(end)) == list(range(behind + 1, end + 1))
        behind = end


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("{every: 12, fragments: 5}", ["merge.fragments", "5", "merge.every 12", "nearest: 4"]),
        ("{every: 12, local_every: 4, fragments: 6}", ["merge.fragments", "merge.local_every 4", "merge.fragments=3"]),
        ("{every: 12, delay: 12}", ["merge.delay", "12", "merge.delay=11"]),
        ("{every: 12, fragments: 3, delay: 4}", ["merge.delay", "merge.delay=3"]),
        ("{every: 12, local_every: 2, delay: 2}", ["merge.delay", "merge.delay=1"]),
        ("{every: 12, growth: 0.001}", ["merge.growth", "0.001", "0.01"]),
        ("{every: 12, delay: 2, optimizer_state: reset}", ["merge.optimizer_state", "keep"]),
    ],
)
def test_what_does_not_fit_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"merge={override}"])
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["merge={every: 12, region_every: 6}"], ["merge.region_every", "topology.nodes_per_region", "6 and 0"]),
        (["topology.nodes_per_region=2"], ["merge.region_every", "topology.nodes_per_region", "0 and 2"]),
        (["merge.region_precision=int8"], ["merge.region_precision", "'int8'", "leave it out"]),
        (["merge={every: 12, region_every: 12}", "topology.nodes_per_region=2"], ["merge.region_every: 12", "less"]),
        (["merge={every: 12, region_every: 5}", "topology.nodes_per_region=2"], ["merge.region_every: 5", "12 steps"]),
        (
            ["merge={every: 12, region_every: 4, fragments: 2}", "topology.nodes_per_region=2"],
            ["merge.region_every: 4", "6 steps"],
        ),
        (
            ["merge={every: 12, region_every: 4, local_every: 3}", "topology.nodes_per_region=2"],
            ["merge.local_every: 3", "merge.local_every=1"],
        ),
        (
            ["merge={every: 12, region_every: 4}", "topology.nodes_per_region=2", "base.scope=global"],
            ["base.scope 'global'"],
        ),
    ],
)
def test_regions_that_do_not_fit_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert [word for word in words if word not in str(caught.value)] == []


def test_one_base_over_all_nodes_cannot_wait() -> None:
    with pytest.raises(ConfigError, match=r"merge\.delay: 2 with base\.scope 'global'"):
        load_config(None, ["merge.delay=2", "base.scope=global"])
