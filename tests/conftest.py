from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import DistributedPool


@pytest.fixture(scope="session")
def pool4() -> Iterator[DistributedPool]:
    """Four processes for the whole session."""
    pool = DistributedPool(4)
    yield pool
    pool.close()
