"""Our count of what leaves a node against the kernel's, on throttled links between network namespaces; and when."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lte_scale.cli import main

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="needs root and iproute2"),
]


def train(data: Path, run_dir: Path, *overrides: str) -> tuple[list[int], float]:
    """Bytes that left each node by the kernel, and what node 0 sent by our count."""
    command = [sys.executable, str(ROOT / "launchers" / "emulate.py"), "--nodes", "2", "--ranks-per-node", "2"]
    command += ["--link-mbit", "200", "--", "train", str(ROOT / "configs" / "demo.yaml"), f"run_dir={run_dir}"]
    command += [f"data.train={data / 'train'}", "data.val=", "metrics.port=0", "checkpoint.every=0", *overrides]
    command += ["model.arguments={patch_size: 4, embed_dim: 256, depth: 4, num_heads: 4}", "train.batch_size=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kernel = [int(line.split()[3].replace(",", "")) for line in done.stdout.splitlines() if line.startswith("node ")]
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return kernel, last["inter_node_bytes"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["merge={every: 4, local_every: 4, path: dense}", "train.duration=20"],
        ["merge={every: 4, local_every: 4, path: factor}", "train.duration=20"],
        ["base={scope: global, gather: pass}", "merge={every: 4, local_every: 4}", "train.duration=4"],
    ],
    ids=["dense", "factor", "global"],
)
def test_what_we_count_is_what_the_kernel_counts(tmp_path: Path, overrides: list[str]) -> None:
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    kernel, counted = train(tmp_path / "data", tmp_path / "run", *overrides)
    assert len(kernel) == 2
    assert counted > 10e6
    # Headers and acknowledgements come on top, less than 2 %, and start-up with the checkpoint's plans, less than 1 MB.
    assert counted < kernel[0] < 1.02 * counted + 1e6


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_no_weight_crosses_the_nodes_between_merges(tmp_path: Path, engine: str) -> None:
    """One base over all nodes, a copy in each: 36 more steps in a window send less than a tenth of it."""
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    sent = {}
    for steps in (4, 40):
        window = [f"merge={{every: {steps}, local_every: {steps}}}", f"train.duration={steps}"]
        place = [f"engine={engine}", "base={scope: global, gather: node}"]
        kernel, _ = train(tmp_path / "data", tmp_path / f"run{steps}", *place, *window)
        sent[steps] = kernel
    base_bytes = 2 * 3_145_728  # four blocks of 12 x 256 x 256 weights in bf16
    for few, many in zip(sent[4], sent[40], strict=True):
        assert few > base_bytes / 2  # the merge and its refresh
        assert many - few < base_bytes / 10
