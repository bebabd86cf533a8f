"""The DeepSpeed JSON: what is generated, what a user's file may change, and one line for each thing it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lte_scale.cli import main
from lte_scale.config import load_config
from lte_scale.config.deepspeed import generated, settings
from lte_scale.config.schema import ConfigError
from lte_scale.topology import Topology

TOPOLOGY = Topology(nodes=2, ranks_per_node=4, heads_per_node=2)


def merged(tmp_path: Path, text: Any, *overrides: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    words = ["engine={name: deepspeed}", f"engine.deepspeed_config={path}", "train.batch_size=32", *overrides]
    return settings(load_config(None, words), TOPOLOGY)


def test_the_yaml_decides() -> None:
    overrides = ["train.batch_size=32", "train.accumulate=3", "base={scope: global, offload: cpu}"]
    tree = generated(load_config(None, ["engine=deepspeed", *overrides]), TOPOLOGY)
    assert tree["train_micro_batch_size_per_gpu"] == 16  # two ranks share a head
    assert tree["train_batch_size"] == 16 * 3 * 8
    assert tree["gradient_accumulation_steps"] == 3
    assert tree["bf16"] == {"enabled": True}
    assert tree["zero_optimization"]["stage"] == 3
    assert tree["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "optimizer" not in tree


def test_a_file_is_merged_over_it(tmp_path: Path) -> None:
    theirs = {
        "wall_clock_breakdown": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": None,
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1000,
            "offload_optimizer": {"device": "none"},
            "zero_hpz_partition_size": 1,
        },
    }
    tree = merged(tmp_path, theirs)
    assert tree["wall_clock_breakdown"] is True
    assert tree["train_micro_batch_size_per_gpu"] == 16
    assert tree["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000
    assert tree["zero_optimization"]["stage3_max_reuse_distance"] == 0


REFUSED: list[tuple[Any, str]] = [
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but 3 follows from the method"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0, but 3 follows"),
    ({"optimizer": {"type": "AdamW"}}, "optimizer is {"),
    ({"scheduler": {"type": "WarmupLR"}}, "use schedule.*"),
    ({"gradient_clipping": 1.0}, "use optimizer.clip_norm"),
    ({"prescale_gradients": True}, "averaged over the ranks of that head and no others"),
    ({"gradient_predivide_factor": 2.0}, "averaged over the ranks of that head and no others"),
    ({"sparse_gradients": True}, "averaged over the ranks of that head and no others"),
    ({"train_batch_size": 1000}, "train_batch_size is 1000, but 128 follows from train.batch_size"),
    ({"train_micro_batch_size_per_gpu": 8}, "is 8, but 16 follows from train.batch_size and topology.heads_per_node"),
    ({"gradient_accumulation_steps": 4}, "is 4, but 1 follows from train.accumulate"),
    ({"bf16": {"enabled": False}}, "bf16.enabled is false, but true follows from train.precision"),
    ({"fp16": {"enabled": True}}, "use train.precision"),
    ({"amp": {"enabled": True}}, "use train.precision"),
    ({"activation_checkpointing": {"partition_activations": True}}, "use train.checkpoint_activations"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'is "cpu", but "none" follows from base.offload'),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "follows from base.offload"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "use optimizer.*"),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "base.scope=global with base.gather=node"),
    ({"zero_optimization": {"mics_shard_size": 8}}, "use base.scope=node"),
    ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "misses what merges add to it"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "misses what merges add to it"),
    ({"zero_optimization": {"memory_efficient_linear": True}}, "is true, but false follows from the method"),
    ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
    ({"train_batchsize": 3}, "did you mean train_batch_size?"),
    ("{", "is not JSON (Expecting property name enclosed in double quotes, line 1 column 2)"),
    ("[1]", "is list, not an object of DeepSpeed's keys"),
]


@pytest.mark.parametrize(("theirs", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_break_the_method_is_refused_by_name(tmp_path: Path, theirs: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, theirs)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"engine.deepspeed_config: {tmp_path / 'ds.json'}: ")
    assert "\n" not in text


def test_the_window_keeps_its_gathered_weights(tmp_path: Path) -> None:
    theirs = {"zero_optimization": {"stage3_param_persistence_threshold": 10}}
    assert merged(tmp_path, theirs)["zero_optimization"]["stage3_param_persistence_threshold"] == 10
    with pytest.raises(ConfigError, match=r"follows from base\.gather=window"):
        merged(tmp_path, theirs, "base.gather=window")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine.deepspeed_config=x.json"], "has no meaning for engine.name 'fsdp'"),
        (["engine={name: deepspeed, deepspeed_config: nowhere.json}"], "nowhere.json: cannot be read (No such file"),
        (["engine=deepsped"], "did you mean deepspeed?"),
        (["engine=deepspeed", "base.precision=nf4"], "base.precision: 'nf4' with engine.name 'deepspeed'"),
    ],
)
def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    config = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
    assert main(["train", config, "base.gather=pass", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_the_nearest_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text("{}")
    words = ["engine=deepspeed", f"engine.deepspeed_config={tmp_path / 'zero_3.json'}"]
    with pytest.raises(ConfigError, match=r"did you mean .*zero3\.json"):
        settings(load_config(None, words), TOPOLOGY)
