"""What benchmarks share: how a run tells its figures, where it ran, and the page that shows them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

_PREFIX = "FIGURES "


def tell(figures: dict[str, Any]) -> None:
    """From rank 0 to the script that started the run."""
    import torch.distributed as dist  # a script that only reads figures starts without torch

    if dist.get_rank() == 0:
        print(_PREFIX + json.dumps(figures), flush=True)


def told(output: str) -> dict[str, Any] | None:
    """What `tell` printed, if it did."""
    lines = [line for line in output.splitlines() if line.startswith(_PREFIX)]
    figures: dict[str, Any] | None = json.loads(lines[-1].removeprefix(_PREFIX)) if lines else None
    return figures


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def hardware() -> str:
    """Cores and name of the processor."""
    return f"{os.cpu_count()} cores, {processor()}"


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks `name` of a page, if it has them."""
    before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
    if mark:
        page.write_text(f"{before}{mark}\n{text}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
