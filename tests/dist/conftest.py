from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.harness import DistributedPool

CASES = {"values": (1, 3), "pairs": (2, 12)}
"""What cases keep of a test: all values each once, or each two together; and of how many cases all are kept."""


@pytest.fixture(scope="session")
def zero4() -> Iterator[DistributedPool]:
    """Four processes for DeepSpeed: it changes the interpreter that imports it."""
    pool = DistributedPool(4)
    yield pool
    pool.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave few cases of a test with many: in which all values occur, with LTE_CASES=pairs any two; =all leaves all."""
    asked = os.environ.get("LTE_CASES", "values")
    if asked == "all":
        return
    together, most = CASES[asked]
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
        if len(cases) > most:
            dropped |= set(cases) - covering(cases, together)
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def covering(cases: list[pytest.Item], together: int) -> set[pytest.Item]:
    """Few of the cases, chosen greedily, with all values (pairs, ...) that any case has `together`."""
    parts = {case: set(combinations(enumerate(values(case)), together)) for case in cases}
    missing = set().union(*parts.values())
    chosen: set[pytest.Item] = set()
    while missing:
        best = max(cases, key=lambda case: len(parts[case] & missing))
        chosen.add(best)
        missing -= parts[best]
    return chosen


def values(case: Any) -> list[str]:
    """The values of a case; one parameter that is a tuple stands for several."""
    given = list(case.callspec.params.values())
    return [repr(value) for value in (given[0] if len(given) == 1 and isinstance(given[0], tuple) else given)]
