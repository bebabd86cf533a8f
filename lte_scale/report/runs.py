"""What a run left behind, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its label, its configuration by dotted key, its records."""

    label: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    def column(self, key: str) -> np.ndarray:
        """One value per record as float64; NaN where there is none."""
        values = [record.get(key) for record in self.records]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def last(self, key: str) -> float:
        """The last finite value, or NaN."""
        finite = self.column(key)[np.isfinite(self.column(key))]
        return float(finite[-1]) if len(finite) else math.nan

    @property
    def seconds(self) -> float:
        """Time spent training: the mean seconds per step between records, times their steps."""
        return float(np.nansum(np.diff(self.column("step"), prepend=0.0) * self.column("step_seconds")))


def load(path: Path, label: str) -> Run:
    """Read config.yaml and metrics.jsonl of a run directory. A last line that is still being written is left out.

    Raises:
        ValueError: if either is missing, empty or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory; name one that `lte-scale train` wrote")
    lines = _read(path / "metrics.jsonl").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = ()
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None and number < len(lines):
            raise ValueError(f"{path / 'metrics.jsonl'}:{number}: damaged record {line[:40]!r}; delete that line")
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'}: holds no record yet; the run writes one every metrics.every steps")
    try:
        config = yaml.safe_load(_read(path / "config.yaml"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'}: holds {type(config).__name__}, not the sections of a configuration")
    return Run(label, flatten(config), records)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason}); a run directory holds it") from error


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
