from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.harness import DistributedPool

MOST_CASES = 12


@pytest.fixture(scope="session")
def zero4() -> Iterator[DistributedPool]:
    """Four processes for DeepSpeed: it changes the interpreter that imports it."""
    pool = DistributedPool(4)
    yield pool
    pool.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with many cases, leave those in which every pair of values occurs; LTE_ALL_CASES=1 runs them all."""
    if os.environ.get("LTE_ALL_CASES"):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.path.is_relative_to(config.rootpath / "tests" / "dist")
        ):
            tests[item.nodeid.partition("[")[0]].append(item)
    dropped: set[pytest.Item] = set()
    for cases in tests.values():
        if len(cases) > MOST_CASES:
            dropped |= set(cases) - covering(cases)
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def covering(cases: list[pytest.Item]) -> set[pytest.Item]:
    """Few of the cases, chosen greedily, with every pair of values that any case has."""
    pairs = {case: set(combinations(enumerate(values(case)), 2)) for case in cases}
    missing = set().union(*pairs.values())
    chosen: set[pytest.Item] = set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def values(case: Any) -> list[str]:
    """The values of a case; one parameter that is a tuple stands for several."""
    given = list(case.callspec.params.values())
    return [repr(value) for value in (given[0] if len(given) == 1 and isinstance(given[0], tuple) else given)]
