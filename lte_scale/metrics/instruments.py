"""The metrics of one rank, in files that the endpoint of its node sums up: prometheus-client's multiprocess mode."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram, values

from lte_scale.metrics.catalogue import METRICS, PHASES, SECONDS, STEP_PHASES

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_TYPES = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Instruments:
    """Counts, sets and observes what `catalogue.METRICS` names, for this rank.

    Args:
        directory: local to the node, shared by its ranks; each writes files of its own, named by its process.
    """

    def __init__(self, directory: Path, *, node: int, local_rank: int) -> None:
        self.node, self.local_rank, self.directory = str(node), str(local_rank), str(directory)
        self._values = values.MultiProcessValue()
        self._metrics = {name: self._make(name) for name in METRICS}
        self._child = cache(self._labelled)
        self._begin()

    def _make(self, name: str) -> Any:
        metric = METRICS[name]
        options: dict[str, Any] = {}
        if metric.kind == "gauge":  # of the rank that said it last; a dead one says nothing
            options["multiprocess_mode"] = "livemostrecent"
        elif metric.kind == "histogram":
            options["buckets"] = SECONDS
        return _TYPES[metric.kind](name, metric.help, ["node", *metric.labels], registry=None, **options)

    def _labelled(self, name: str, labels: tuple[str, ...]) -> Any:
        with self._in_files():
            return self._metrics[name].labels(self.node, *labels)

    @contextmanager
    def _in_files(self) -> Iterator[None]:
        """Within: what is made of metrics is kept in files. Others of this process, not ours, stay in its memory."""
        before, variable = values.ValueClass, os.environ.get(_VARIABLE)
        values.ValueClass, os.environ[_VARIABLE] = self._values, self.directory  # type: ignore[misc, assignment]
        try:
            yield
        finally:
            values.ValueClass = before  # type: ignore[misc]
            if variable is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = variable

    def _begin(self) -> None:
        """A counter that is there from the start lets rate() see its first increase."""
        for name in ("lte_images_total", "lte_bad_samples_total", "lte_bad_shards_total"):
            self.count(name, 0)
        for phase in PHASES:
            self.count("lte_rank_phase_seconds_total", 0, self.local_rank, phase)
        for phase in STEP_PHASES:
            self._child("lte_step_phase_seconds", (phase,))

    def count(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add to a counter."""
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge; None leaves it as it is."""
        if value is not None:
            self._child(name, labels).set(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._child(name, labels).observe(value)


def versions(accelerator: str) -> tuple[str, str, str, str]:
    """The labels of `lte_build_info`."""
    return _version("lte-scale"), _version("torch"), platform.python_version(), accelerator


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
