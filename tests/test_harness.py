"""The process pool that the distributed tests stand on: groups, failures, hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import DistributedError, DistributedPool


def place_and_sum(rank: int, scale: float) -> tuple[int, int, int, float]:
    total = torch.tensor([scale * rank])
    dist.all_reduce(total)
    return rank, int(os.environ["LOCAL_RANK"]), dist.get_world_size(), float(total)


def fail_on_the_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        raise ValueError("the cause")
    dist.all_reduce(torch.ones(1))


def die_on_the_first(rank: int) -> None:
    if rank == 0:
        os._exit(9)
    dist.all_reduce(torch.ones(1))


def hang_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


def pids(rank: int) -> int:
    return os.getpid()


def test_every_run_has_a_group_of_its_own_shape_in_the_same_processes(pool4: DistributedPool) -> None:
    before = pool4.run(pids)
    assert pool4.run(place_and_sum, 2.0) == [(r, r % 2, 4, 12.0) for r in range(4)]
    assert pool4.run(place_and_sum, 1.0, ranks_per_node=4) == [(r, r, 4, 6.0) for r in range(4)]
    assert pool4.run(place_and_sum, 1.0, ranks_per_node=1, world_size=3) == [(r, 0, 3, 3.0) for r in range(3)]
    assert pool4.run(pids) == before


def test_more_ranks_than_processes_are_refused(pool4: DistributedPool) -> None:
    with pytest.raises(ValueError, match="world_size 5: the pool has 4"):
        pool4.run(pids, world_size=5)


def test_failures_and_hangs_are_named_and_the_pool_goes_on() -> None:
    pool = DistributedPool(2)
    try:
        before = pool.run(pids)
        with pytest.raises(DistributedError, match=r"rank 1:\n(.|\n)*ValueError: the cause"):
            pool.run(fail_on_the_last)
        with pytest.raises(DistributedError, match="rank 0:\nthe process died"):
            pool.run(die_on_the_first)
        began = time.monotonic()
        with pytest.raises(DistributedError, match=r"ranks \[1\] did not end within 2.0 s"):
            pool.run(hang_on_one, timeout=2.0)
        assert time.monotonic() - began < 30
        after = pool.run(pids)
        assert not set(before) & set(after)
        assert pool.run(place_and_sum, 1.0) == [(0, 0, 2, 1.0), (1, 1, 2, 1.0)]
    finally:
        pool.close()
    assert not [pid for pid in after if os.path.exists(f"/proc/{pid}")]
