"""benchmarks/merge.py: what it counts against arithmetic, its table, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lte_scale.collectives import Collectives
from lte_scale.config import load_config
from lte_scale.topology import Topology

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "merge.py"
sys.path.append(str(SCRIPT.parent))

from merge_table import Run, speed_table, spread  # noqa: E402
from peers import full_rank_model  # noqa: E402


def a_run(method: str, link: float | None, seconds: float, merge_seconds: float | None = None) -> Run:
    figures = {"steps": 10, "seconds": seconds, "bytes_by_node": [3_000_000, 5_000_000], "merge_seconds": merge_seconds}
    return {"method": method, "nodes": 2, "link_mbit": link, "images_per_step": 16, **figures}


def test_table() -> None:
    runs = [
        a_run("ddp", 100.0, 40),
        a_run("ddp", None, 10),
        a_run("diloco", 100.0, 20, 5),
        a_run("diloco", 100.0, 16, 8),
        {**a_run("lte_far", None, 8, 2), "wait_seconds": 0.4},
    ]
    lines = speed_table(runs).splitlines()
    assert lines[2] == "| 2 | 100 Mbit/s | `ddp` | 25 | 1 | 4 | 1 | 0.25 | - | - |"
    assert lines[3] == "| 2 | 100 Mbit/s | `diloco` | 25 | 1 | 9 (8 - 10) | 2.2 | - | 38 % | - |"
    assert lines[4] == "| 2 | no limit | `ddp` | 25 | 1 | 16 | 1 | 1 | - | - |"
    assert lines[5] == "| 2 | no limit | `lte_far` | 25 | 1 | 20 | 1.2 | 1 | 25 % | 5 % |"
    assert len(lines) == 6


def test_spread_shows_only_what_differs_in_print() -> None:
    assert spread([1234.5, 1234.6]) == "1230"
    assert spread([1.0, 2.0, 4.0]) == "2 (1 - 4)"


def test_peers_begin_with_the_weights_of_lte() -> None:
    from lte_scale.assemble import assemble

    small = "model.arguments={patch_size: 7, embed_dim: 32, depth: 1, num_heads: 2}"
    config = load_config(
        None, ["engine=none", "model.image_size=14", "model.channels=1", "train.precision=fp32", small]
    )
    images = torch.randn(2, 1, 14, 14)
    lte = assemble(config, 10, Collectives(Topology()), torch.device("cpu"))
    torch.testing.assert_close(full_rank_model(config, 10)(images), lte.model(images))


def test_refuses_in_one_line(tmp_path: Path) -> None:
    """No `tc` on the path, or no such configuration."""
    (tmp_path / "ip").symlink_to("/bin/true")
    command = [sys.executable, str(SCRIPT), "--methods", "ddp"]
    environ = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "benchmarks/merge.py: network namespaces need the command tc: apt-get install iproute2\n"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="needs root and iproute2")
def test_lte_sends_less_than_ddp_and_ddp_what_arithmetic_says(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--methods", "ddp", "lte_full", "--nodes", "2", "--links", "1000"]
    command += ["--rounds", "1", "--batch-size", "2", "--data", "digits", "--out", str(tmp_path)]
    command += ["--set", "model.arguments={patch_size: 7, embed_dim: 192, depth: 2, num_heads: 3}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    ddp, lte = json.loads((tmp_path / "merge.json").read_text())["runs"]
    assert (ddp["method"], lte["method"]) == ("ddp", "lte_full")
    assert ddp["steps"] == lte["steps"] == 16
    assert 0 < lte["wait_seconds"] < lte["merge_seconds"]
    for by_ddp, by_lte in zip(ddp["bytes_by_node"], lte["bytes_by_node"], strict=True):
        # 2 (K - 1) / K of 2 bytes for each parameter and step; headers and acknowledgements come on top.
        assert 1 < by_ddp / (ddp["steps"] * 2 * ddp["parameters"]) < 1.05
        assert by_lte < by_ddp / 4
    assert "| 2 | 1 Gbit/s | `lte_full` |" in done.stdout
