"""Data workers: they end with their process, and signals to the group do not reach them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lte_scale.data import ShardIndex, open_index
from lte_scale.index import Shard
from tests.shard_files import write_lengths
from tests.streams import HERE, UNEVEN, stream, take

SCRIPT = """
import signal, sys
from tests.shard_files import CLASSES, PLAIN, SIZE, open_index
from lte_scale.config.schema import DataConfig
from lte_scale.data import TrainStream
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
source = TrainStream(
    open_index(sys.argv[1]), heads=range(1), total_heads=1, member=0, members=1, batch_size=4, seed=0, image_size=SIZE,
    channels=1, num_classes=CLASSES, augment=PLAIN, data=DataConfig(workers=2),
)
batches = source.iterate(0)
next(batches)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    next(batches)
print("done", flush=True)
"""


def group_is_empty(group: int, within_seconds: float) -> bool:
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_signals_to_the_group_leave_the_workers_to_finish_and_they_end_with_the_process(tmp_path: Path) -> None:
    write_lengths(tmp_path, UNEVEN)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate("go\n", timeout=60)  # the script leaves its stream open
    assert (output, errors, process.returncode) == ("done\n", "", 0)
    assert group_is_empty(process.pid, 5)


def _one_batch(folder: str, ready: Connection) -> None:
    os.setsid()
    batches = stream(open_index(folder), data=replace(HERE, workers=2)).iterate(0)
    next(batches)
    ready.send(True)
    time.sleep(60)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    write_lengths(tmp_path, UNEVEN)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_one_batch, args=(str(tmp_path), theirs))
    process.start()
    assert process.pid is not None
    assert ours.poll(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert group_is_empty(process.pid, 20)


def test_workers_stuck_in_a_read_do_not_hold_up_the_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")  # opening it blocks, for nobody writes
    index = ShardIndex("stuck", (Shard(str(tmp_path / "0.tar"), 10),))
    others = set(multiprocessing.active_children())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        take(stream(index, data=replace(HERE, workers=3)), 1)
    end = time.monotonic() + 5  # by itself, torch waits 5 seconds for each of the three
    while set(multiprocessing.active_children()) - others and time.monotonic() < end:
        time.sleep(0.1)
    assert not set(multiprocessing.active_children()) - others


STARTING = """
import os, signal, threading, time
from lte_scale.loader import in_workers
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
def signals():
    while True:
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGUSR1)
        time.sleep(0.001)
threading.Thread(target=signals, daemon=True).start()
for _ in range(3):
    print(list(in_workers(lambda worker, workers: iter(range(worker, 6, workers)), 2, 2)), flush=True)
"""


def test_signals_do_not_reach_workers_that_are_starting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING], cwd=Path(__file__).parents[1], text=True, capture_output=True,
        start_new_session=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("[0, 1, 2, 3, 4, 5]\n" * 3, 0), done.stderr
