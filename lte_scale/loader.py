"""Worker processes for a sequence whose items can be made independently: torch's DataLoader, made signal-proof."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

GRACE_SECONDS = 1.0

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Make(Protocol[T_co]):
    """`make(worker, workers)` yields items worker, worker + workers, ... of the sequence."""

    def __call__(self, worker: int, workers: int, /) -> Iterator[T_co]: ...


def in_workers(make: Make[T], workers: int, prefetch: int) -> Iterator[T]:
    """All items of the sequence in order, made by `workers` processes that hold `prefetch` items each; 0: made here.

    The processes end when the iterator is closed, when this process exits, and when it dies.
    """
    # Nothing is ever sent: what the workers wait for is that the writing end closes, whoever closes it.
    reader, writer = multiprocessing.Pipe(duplex=False)
    atexit.register(writer.close)
    loader = DataLoader(
        _Source(make),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch if workers else None,
        # A process that has not touched CUDA must not open a context for the sake of pinning.
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=partial(_start_worker, reader, writer),
        # The loader draws a seed it never uses; not from the training loop's generator.
        generator=torch.Generator(),
    )
    try:
        # A signal to the whole process group, or to all processes of a job, is the training loop's to handle, and it
        # still needs batches to finish its step: workers inherit that they heed none, from their first moment on.
        heeded = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        try:
            items = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heeded)
        yield from items
    finally:
        atexit.unregister(writer.close)
        writer.close()
        reader.close()


class _Source(IterableDataset[T]):
    def __init__(self, make: Make[T]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        return self.make(worker.id, worker.num_workers) if worker else self.make(0, 1)


def _unchanged(item: T) -> T:
    return item


def _start_worker(reader: Connection, writer: Connection, worker: int) -> None:
    """A worker heeds no signal: it ends when its loop has ended."""
    writer.close()
    torch.set_num_threads(1)
    gc.freeze()  # what was there before is never garbage, and looking through it takes a fifth of a small image's time
    threading.Thread(target=_end_after, args=(reader,), daemon=True).start()


def _end_after(reader: Connection) -> None:
    """End this worker soon after the loop, even out of a read that never returns."""
    with suppress(EOFError, OSError):
        reader.recv_bytes()
    time.sleep(GRACE_SECONDS)
    os._exit(0)
