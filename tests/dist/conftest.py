from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import DistributedPool


@pytest.fixture(scope="session")
def zero4() -> Iterator[DistributedPool]:
    """Four processes for DeepSpeed: it changes the interpreter that imports it."""
    pool = DistributedPool(4)
    yield pool
    pool.close()
