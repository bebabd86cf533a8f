"""Real gloo process groups for tests: processes that stay alive, since starting them costs more than most tests."""

from __future__ import annotations

import multiprocessing as mp
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

RUNS_OF_A_PROCESS = 10


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class DistributedError(AssertionError):
    """A function failed on a rank; the message is that rank's traceback."""


class DistributedPool:
    """`size` processes that run functions as the ranks of a process group, a fresh group for every run.

    They are forked from a process that has imported what takes seconds, and replaced now and then: process groups that
    something still refers to keep threads that wake a hundred times a second.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._runs = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks_per_node: int = 2,
        world_size: int | None = None,
        timeout: float = 150.0,
    ) -> list[Any]:
        """`function(rank, *args)` on every rank; its results by rank.

        Raises:
            DistributedError: with the traceback of the first rank that failed, or if not all end within `timeout`
                seconds. Either way the next run starts new processes.
        """
        world = world_size or self.size
        if not 1 <= world <= self.size:
            raise ValueError(f"world_size {world}: the pool has {self.size} processes")
        if self._runs == RUNS_OF_A_PROCESS:
            self.close()
        if not self._workers:
            self._start()
        self._runs += 1
        job = {"port": free_port(), "world": world, "ranks_per_node": ranks_per_node}
        for _, pipe in self._workers[:world]:
            pipe.send((job, function, args))
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world])}
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout
        while waiting and (ready := mp.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for end in ready:
                pipe = cast(Connection, end)
                rank = waiting.pop(pipe)
                try:
                    failed_at, result = pipe.recv()
                except (EOFError, OSError):
                    failed_at, result = 0.0, "the process died"
                if failed_at is None:
                    results[rank] = result
                else:  # the others may wait for this rank for ever, or tell sooner what it did to them
                    failures.append((failed_at, rank, result))
                    deadline = min(deadline, time.monotonic() + 0.5)
        if not failures and not waiting:
            return [results[rank] for rank in range(world)]
        self.close()
        if failures:
            _, rank, cause = min(failures)
            raise DistributedError(f"rank {rank}:\n{cause}")
        raise DistributedError(f"ranks {sorted(waiting.values())} did not end within {timeout} s")

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["lte_scale.assemble", "lte_scale.checkpoint"])
        self._runs = 0
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, pipe in self._workers:
            pipe.recv()  # ready: a timeout counts the function alone

    def close(self) -> None:
        """Kill the processes; the next run starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            job, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(_run(rank, job, function, args))
        except BaseException:
            pipe.send((time.monotonic(), traceback.format_exc()))


def _run(
    rank: int, job: dict[str, int], function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[float | None, Any]:
    """(None, result), or (the time of the failure, traceback)."""
    from datetime import timedelta

    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(job["world"]),
        LOCAL_RANK=str(rank % job["ranks_per_node"]),
        LOCAL_WORLD_SIZE=str(job["ranks_per_node"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    dist.barrier()  # a function that ends at once would close connections that others still make
    try:
        return None, function(rank, *args)
    except BaseException:
        return time.monotonic(), traceback.format_exc()  # before this group's end makes the other ranks fail
    finally:
        dist.destroy_process_group()
