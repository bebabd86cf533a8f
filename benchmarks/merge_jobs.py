"""What `benchmarks/merge.py` starts: shards to train on, jobs on emulated nodes, and where they run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lte_scale.config import dump, load_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "launchers"))

from parent_death import die_with_parent  # noqa: E402


def shards(source: str, folder: Path) -> Path:
    """Write the images as shards, `train` and `val` of the folder that is returned."""
    command = [sys.executable, "-m", "lte_scale", "shards", source, str(folder / "shards")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return folder / "shards"


def emulated(nodes: int, ranks_per_node: int, link_mbit: float | None, words: Sequence[str]) -> str:
    """Run `words` on emulated nodes; what it printed. `link_mbit` None: without network namespaces."""
    command = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", str(nodes)]
    command += ["--ranks-per-node", str(ranks_per_node)]
    command += ["--link-mbit", f"{link_mbit:g}"] if link_mbit is not None else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipe = subprocess.PIPE
    # Interrupted, this process ends at once, and the emulation after it, which has nodes to end and to remove.
    with subprocess.Popen(
        [*command, "--", *words],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environ,
        start_new_session=True,
        preexec_fn=die_with_parent,
    ) as job:
        output, errors = job.communicate()
    if job.returncode:
        sys.exit(f"{' '.join(words)}: failed\n{output}{errors}")
    return output


def script(name: str) -> str:
    return str(ROOT / "benchmarks" / name)


def write_config(folder: Path, base: Path | None, overrides: Sequence[str]) -> Path:
    """The configuration of one run in a file of `folder`, and its run directory there."""
    path = folder / "config.yaml"
    path.write_text(dump(load_config(base, [*overrides, f"run_dir={folder / 'run'}"])))
    return path
