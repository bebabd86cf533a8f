from __future__ import annotations

from itertools import pairwise

import pytest

from lte_scale.config.schema import Config, MergeConfig, OptimizerConfig, TrainConfig
from lte_scale.schedules import due, lr_at, parse_duration, passed, to_steps
from lte_scale.state import Schedule


def rates(name: str, **options: float) -> list[float]:
    settings = {"peak": 1.0, "total": 100, "warmup": 10, "decay": 20, "final_ratio": 0.1, **options}
    return [lr_at(step, name=name, **settings) for step in range(1, 101)]  # type: ignore[arg-type]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for name in ("cosine", "wsd", "constant"):
        assert rates(name)[:10] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_shapes_after_the_warm_up() -> None:
    cosine = rates("cosine")
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[54] == pytest.approx(0.55)
    assert all(a >= b for a, b in pairwise(cosine[10:]))
    wsd = rates("wsd")
    assert wsd[10:80] == [1.0] * 70
    assert wsd[-1] == pytest.approx(0.1)
    assert rates("constant")[-1] == 1.0


@pytest.mark.parametrize(("text", "steps"), [("500", 500), ("2ep", 25), ("0.5ep", 7), ("0", 0), ("0ep", 0)])
def test_durations(text: str, steps: int) -> None:
    assert to_steps(text, 12.5) == steps


@pytest.mark.parametrize("text", ["", "ep", "2.5", "-1", "1e3", "two", "5 epochs"])
def test_bad_durations_say_what_is_right(text: str) -> None:
    with pytest.raises(ValueError, match="write steps as"):
        parse_duration(text)


def test_due_and_passed() -> None:
    assert [s for s in range(1, 11) if due(s, 4, last=10)] == [4, 8, 10]
    assert not any(due(s, 0) for s in range(10))
    assert passed(10, 4, 7)
    assert not passed(11, 4, 8)
    assert not passed(11, 0, 0)


def test_runs_end_with_a_whole_window() -> None:
    config = Config(train=TrainConfig(duration="95", batch_size=4), merge=MergeConfig(every=20))
    assert Schedule.of(config, samples=1000, heads=2).total == 100


def test_master_decay_is_that_of_the_windows_steps() -> None:
    config = Config(
        train=TrainConfig(duration="40"),
        merge=MergeConfig(every=20, weight_decay=0.1),
        optimizer=OptimizerConfig(lr=0.01),
    )
    schedule = Schedule.of(config, samples=1000, heads=2)
    window = [schedule.lr(0.01, step) for step in range(21, 41)]
    assert schedule.master_decay(40) == pytest.approx(0.1 * sum(window))
