"""What a run left behind, read for a report."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lte_scale.report.events import Event, read_events
from lte_scale.schedules import parse_duration


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its label, its configuration by dotted key, the columns of its records, its events.

    A figure of a part has its own column: `phase_seconds.merge`, `head_loss.3`.
    """

    label: str
    config: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]
    events: Sequence[Event] = ()

    @property
    def steps(self) -> np.ndarray:
        return self.columns["step"]

    def column(self, key: str) -> np.ndarray:
        """One value per record as float64; NaN where there is none."""
        return self.columns.get(key, np.full(len(self.steps), math.nan))

    def parts(self, name: str) -> dict[str, np.ndarray]:
        """The columns of `name`'s parts, by what comes after the dot."""
        return {key.partition(".")[2]: column for key, column in self.columns.items() if key.startswith(f"{name}.")}

    def over(self, key: str, reduce: Callable[[np.ndarray], Any]) -> float:
        """`reduce` over the finite values of a column; NaN if there are none."""
        finite = self.column(key)[np.isfinite(self.column(key))]
        return float(reduce(finite)) if len(finite) else math.nan

    def last(self, key: str) -> float:
        """The last finite value, or NaN."""
        return self.over(key, lambda values: values[-1])

    @property
    def step(self) -> int:
        """The furthest recorded."""
        return int(self.steps.max())

    @property
    def seconds(self) -> float:
        """Time spent training: the mean seconds per step between records, times their steps."""
        return float(np.nansum(np.diff(self.steps, prepend=0.0) * self.column("step_seconds")))

    @property
    def planned(self) -> float:
        """Steps of the whole run; NaN where nothing tells."""
        told = [event.planned for event in self.events if event.planned is not None]
        try:
            length, unit = parse_duration(str(self.config.get("train.duration")))
        except ValueError:
            return told[-1] if told else math.nan
        if unit == "steps":
            return length
        if told:
            return told[-1]
        epoch = self.last("epoch")  # rounded to four digits
        if epoch >= length - 1e-4:
            return float(self.step)
        return math.ceil(length * self.step / epoch) if epoch > 0 else math.nan


def load(path: Path, label: str) -> Run:
    """Read config.yaml, metrics.jsonl and, where there is one, events.log of a run directory.

    A last line that is still being written is left out.

    Raises:
        ValueError: if the configuration or the metrics are missing, empty or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory; name one that `lte-scale train` wrote")
    columns = _columns(_records(path / "metrics.jsonl"))
    if not columns:
        raise ValueError(f"{path / 'metrics.jsonl'}: holds no record yet; the run writes one every metrics.every steps")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path / "config.yaml", error) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'}: holds {type(config).__name__}, not the sections of a configuration")
    return Run(label, flatten(config), columns, read_events(path / "events.log"))


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line) if line.strip() else None
                except ValueError:
                    record = ()
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record
                elif record is not None and line.endswith("\n"):
                    raise ValueError(f"{path}:{number}: damaged record {line[:40].rstrip()!r}; delete that line")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
    return ValueError(f"{path}: cannot be read ({reason}); a run directory holds it")


def _columns(records: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Every finite number of the records by dotted key: as columns 100,000 records take little memory."""
    columns: dict[str, array[float]] = {}
    rows = 0
    for row, record in enumerate(records):
        rows = row + 1
        for key, value in _numbers(record):
            column = columns.setdefault(key, array("d"))
            column.extend([math.nan] * (row - len(column)))
            if len(column) == row:
                column.append(value)
    for column in columns.values():
        column.extend([math.nan] * (rows - len(column)))
    return {key: np.array(column) for key, column in columns.items()}


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from _numbers({str(i): each for i, each in enumerate(value)}, f"{prefix}{key}.")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; an empty section stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as tell them all apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
