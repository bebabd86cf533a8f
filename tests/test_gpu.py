"""On a CUDA device: the same learning as on the CPU, and the merged model learns in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lte_scale.cli import main

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(data: Path, run_dir: Path, *overrides: str) -> list[float]:
    words = ["train", str(ROOT / "configs" / "demo.yaml"), f"data.train={data / 'train'}", f"data.val={data / 'val'}"]
    fixed = [f"run_dir={run_dir}", "metrics={every: 1, port: 0}", "merge={every: 4, local_every: 4}"]
    assert main([*words, *fixed, *overrides]) == 0
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_cuda_learns_what_the_cpu_learns(tmp_path: Path, heads: int, mode: str) -> None:
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    same = [f"topology.heads_per_node={heads}", f"adapters.mode={mode}", "train.duration=12", "train.precision=fp32"]
    cpu = losses(tmp_path / "data", tmp_path / "cpu", "train.device=cpu", *same)
    cuda = losses(tmp_path / "data", tmp_path / "cuda", "train.device=cuda", *same)
    assert cuda == pytest.approx(cpu, rel=1e-3)


@pytest.mark.parametrize("extra", ["train.compile=true", "train.checkpoint_activations=true", "base.gather=pass"])
def test_bf16_learns(tmp_path: Path, extra: str) -> None:
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    seen = losses(tmp_path / "data", tmp_path / "run", "train.device=cuda", "train.duration=200", extra)
    assert seen[-1] < 0.7 * seen[0]
