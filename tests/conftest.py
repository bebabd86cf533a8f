from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lte_scale.cli import main
from tests.harness import DistributedPool

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job, and so would all be that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits, in train/ and val/."""
    out = tmp_path_factory.mktemp("data") / "digits"
    assert main(["shards", "digits", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def pool4() -> Iterator[DistributedPool]:
    """Four processes for the whole session."""
    pool = DistributedPool(4)
    yield pool
    pool.close()
