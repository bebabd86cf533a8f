"""Worker processes for a sequence whose items can be made independently: torch's DataLoader, made signal-proof."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Make(Protocol[T_co]):
    """`make(worker, workers)` yields items worker, worker + workers, ... of the sequence."""

    def __call__(self, worker: int, workers: int, /) -> Iterator[T_co]: ...


def in_workers(make: Make[T], workers: int, prefetch: int) -> Iterator[T]:
    """All items of the sequence in order, made by `workers` processes that hold `prefetch` items each; 0: made here.

    The processes end when the iterator is closed, when this process exits, and when it dies.
    """
    items = _items(make, workers, prefetch)
    # Python joins child processes at exit, so they must have been told to end before.
    atexit.register(_close, weakref.ref(items))
    return items


def _items(make: Make[T], workers: int, prefetch: int) -> Iterator[T]:
    ending = RawValue("b", 0)
    loader = DataLoader(
        _Source(make),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch if workers else None,
        # A process that has not touched CUDA must not open a context for the sake of pinning.
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=partial(_start_worker, ending),
        # The loader draws a seed it never uses; not from the training loop's generator.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    finally:
        ending.value = 1


def _close(items: weakref.ref[Any]) -> None:
    if (generator := items()) is not None:
        generator.close()


class _Source(IterableDataset[T]):
    def __init__(self, make: Make[T]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        return self.make(worker.id, worker.num_workers) if worker else self.make(0, 1)


def _unchanged(item: T) -> T:
    return item


def _start_worker(ending: Any, worker: int) -> None:
    """A signal to the whole process group is the training loop's to handle, and it still needs batches to finish its
    step. Once the loop has ended, SIGTERM ends a worker that is stuck in a slow read."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)
