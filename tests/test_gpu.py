"""On a CUDA device: the same learning as on the CPU, in bf16, with offloaded weights and with either engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lte_scale.assemble import adapt
from lte_scale.cli import main
from lte_scale.config.schema import Config, EngineConfig, OptimizerConfig, TopologyConfig, TrainConfig
from tests.reference import CLASSES, TINY

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


EXTRAS = ("train.compile=true", "train.checkpoint_activations=true", "base.gather=pass", "optimizer.moments=log8")


@pytest.mark.parametrize("extra", EXTRAS)
def test_bf16_learns_what_fp32_learns(tmp_path: Path, extra: str) -> None:
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    same = ["train.device=cuda", "train.duration=100"]
    plain = losses(tmp_path / "data", tmp_path / "plain", *same, "train.precision=fp32")
    seen = losses(tmp_path / "data", tmp_path / "run", *same, extra)
    assert sum(plain[-10:]) < 0.95 * sum(plain[:10])
    assert sum(seen[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.02)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_offload_changes_no_loss(tmp_path: Path, engine: str, mode: str) -> None:
    """Parts in CPU memory, factors and products on the device: local merges, momentum and folding meet both."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    same = [f"engine={engine}", f"adapters.mode={mode}", "train.device=cuda", "train.duration=16", "base.gather=pass"]
    same += ["merge={every: 8, local_every: 4, outer: nesterov}", "train.ema_decay=0.5", "train.precision=fp32"]
    kept = losses(tmp_path / "data", tmp_path / "kept", *same)
    offloaded = losses(tmp_path / "data", tmp_path / "offloaded", *same, "base.offload=cpu")
    assert offloaded == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("moments", ["fp32", "log8"])
def test_a_step_never_waits_for_the_device(moments: str) -> None:
    """Forward, backward, clipping, skipping and AdamW of one head are queued; the host hears of skips a step later."""
    config = Config(
        model=TINY,
        engine=EngineConfig(name="none"),
        topology=TopologyConfig(heads_per_node=1),
        train=TrainConfig(precision="bf16"),
        optimizer=OptimizerConfig(moments=moments),
    )
    lte = adapt(config, CLASSES, "cuda")
    images = torch.randn(8, TINY.channels, TINY.image_size, TINY.image_size, device="cuda")
    labels = torch.arange(8, device="cuda") % CLASSES

    def step(weight: float) -> list[bool]:
        with lte.autocast:
            logits = lte.model(images).float()
        loss = weight * torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return lte.optimizer.step(loss.detach().view(1), lambda peak: peak)[1]

    step(1.0)
    torch.cuda.synchronize()
    before = {name: p.clone() for name, p in lte.heads.parameters().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert step(float("nan")) == [False]
        assert step(1.0) == [True]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(not torch.equal(p, before[name]) for name, p in lte.heads.parameters().items())
    assert all(p.isfinite().all() for p in lte.heads.parameters().values())


def test_deepspeed_learns_what_fsdp_learns(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    assert main(["shards", "digits", str(tmp_path / "data")]) == 0
    same = ["train.device=cuda", "train.duration=40"]
    fsdp = losses(tmp_path / "data", tmp_path / "fsdp", *same)
    deepspeed = losses(tmp_path / "data", tmp_path / "deepspeed", *same, "engine=deepspeed")
    assert deepspeed == pytest.approx(fsdp, rel=1e-2)
