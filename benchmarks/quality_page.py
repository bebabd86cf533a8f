"""docs/quality.md of the runs of `benchmarks/quality.py`."""

from pathlib import Path
from typing import Any


def write_page(page: Path, runs: list[dict[str, Any]], rows: list[str]) -> None: ...
