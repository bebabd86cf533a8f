"""The stopwatch: parts add up to the whole, by lap, and what is not read does not pile up."""

from __future__ import annotations

import time

import pytest
import torch

from lte_scale import timing
from lte_scale.timing import Stopwatch


def test_an_inner_part_is_not_the_outer_ones() -> None:
    clock: Stopwatch[str] = Stopwatch(torch.device("cpu"))
    began = time.perf_counter()
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.05)
        time.sleep(0.01)
    whole = time.perf_counter() - began
    marks = clock.drain()
    assert [(lap, name) for lap, name, _ in marks] == [(0, "outer"), (0, "inner"), (0, "outer")]
    outer, inner = marks[0][2] + marks[2][2], marks[1][2]
    assert outer >= 0.03 and inner >= 0.05
    assert outer + inner == pytest.approx(whole, abs=0.002)
    assert clock.drain() == []


def test_laps_and_failures() -> None:
    clock: Stopwatch[str] = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), clock("fails"):
            _ = 1 / 0
        clock.lap()
    assert [(lap, name) for lap, name, _ in clock.drain()] == [(0, "fails"), (1, "fails")]


def test_what_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_KEPT", 10)
    clock: Stopwatch[int] = Stopwatch(torch.device("cpu"))
    for number in range(25):
        with clock(number):
            pass
    assert [name for _, name, _ in clock.drain()] == list(range(15, 25))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_it_times_the_device_and_does_not_wait() -> None:
    device = torch.device("cuda")
    clock: Stopwatch[str] = Stopwatch(device)
    x = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with clock("products"):
        for _ in range(20):
            x = x @ x / 100
    queued = time.perf_counter() - began
    ((_, _, seconds),) = clock.drain()
    assert seconds > 2 * queued
