"""benchmarks/soak.py finds what leaks, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "soak.py"
sys.path.append(str(SCRIPT.parent))

from soak import Look, row  # noqa: E402

# What each of four processes does ten times a second.
EACH = {
    "memory": "held.append(b'x' * 200_000)",
    "descriptors": "held.append(open('/dev/null'))",
    "threads": "(thread := threading.Thread(target=time.sleep, args=[60], daemon=True)).start()",
    "sound": "bytes(200_000), open('/dev/null').close()",
}
LOOP = "import threading, time\nheld = []\nwhile True:\n    {}\n    time.sleep(0.1)\n"


@pytest.mark.faults
def test_a_leak_is_found_in_the_process_that_has_it(tmp_path: Path) -> None:
    for name, action in EACH.items():
        (tmp_path / f"{name}.py").write_text(LOOP.format(action))
    started = " & ".join(f"{sys.executable} {tmp_path / name}.py" for name in EACH)
    words = [
        "--minutes",
        "0.33",
        "--every",
        "0.5",
        "--",
        "bash",
        "-c",
        f"trap 'kill $(jobs -p)' TERM; {started} & wait",
    ]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1].removeprefix("grew: ").split("; ")
    grew = dict(line.split(": ") for line in said)  # what holds descriptors or threads takes memory too
    assert {process: what.split(", ")[-1] for process, what in grew.items()} == {
        f"{name}.py": name for name in ("descriptors", "memory", "threads")
    }


@pytest.mark.parametrize(
    ("looks", "grew"),
    [
        ([Look(60.0 * minute, 500, 20, 5) for minute in range(60)], ""),
        ([Look(60.0 * minute, 500 + 0.2 * minute, 20, 5) for minute in range(60)], ""),  # 12 MB an hour of 500: 2 % + 8
        ([Look(60.0 * minute, 500 + 0.5 * minute, 20, 5) for minute in range(60)], "memory"),
        ([Look(60.0 * minute, 500, 20 + minute // 30, 5) for minute in range(60)], "descriptors"),
        ([Look(60.0 * minute, 500, 20 + 3 * (minute % 7 == 0), 5 + minute % 2) for minute in range(60)], ""),  # saves
        ([Look(60.0 * minute, 700 if minute < 5 else 500, 20, 5) for minute in range(60)], ""),
    ],
)
def test_what_counts_as_growth(looks: list[Look], grew: str) -> None:
    assert row("rank 0", looks).grew == grew
