"""What plan computes against formulas written out and real tensors, and what it prints."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_scale import plan
from lte_scale.arrangement import Arrangement
from lte_scale.config import load_config
from lte_scale.config.schema import AdaptersConfig, BaseConfig, Config, MergeConfig, ModelConfig, TrainConfig
from lte_scale.cost import Layer, Shapes, saved_activations, shapes_of, step_flops, training_flops
from lte_scale.engines.base import materialise, repeated_blocks, wrap_blocks
from lte_scale.estimate import Plan, make_plan, path_rows
from lte_scale.live import LiveBytes
from lte_scale.memory import memory
from lte_scale.model import Heads, attach, build
from lte_scale.topology import Topology
from lte_scale.traffic import merge_traffic, of_node, run_traffic, step_traffic
from tests.reference import CLASSES, TINY

VIT_L = Path(__file__).parent.parent / "configs" / "vit_l_64gpu.yaml"
PATCHES, TOKENS, WIDTH, DEPTH, RANK = 4, 6, 24, 2, 3


def adapted(heads: int = 1, mode: str = "reset") -> tuple[nn.Module, Heads]:
    model = build(TINY, CLASSES, seed=0)
    return model, attach(model, AdaptersConfig(rank=RANK, alpha=6, mode=mode), range(heads), seed=0)


def rows_and_shapes() -> list[tuple[int, int, int]]:
    """(rows per image, in, out) of every linear map of TINY; the patch embedding comes first."""
    block = [(TOKENS, WIDTH, 3 * WIDTH), (TOKENS, WIDTH, WIDTH), (TOKENS, WIDTH, 4 * WIDTH), (TOKENS, 4 * WIDTH, WIDTH)]
    return [(PATCHES, 14 * 14, WIDTH), *(block * DEPTH), (1, WIDTH, CLASSES)]


def written_out(rank: int, *, constant: int = 0) -> int:
    """docs/plan.md: FLOPs per image of a training step of TINY; rank 0 is full-rank, `constant` that of A' and B'."""
    total = DEPTH * 12 * TOKENS**2 * WIDTH  # scores and values, forward and twice that backward
    for index, (rows, into, out) in enumerate(rows_and_shapes()):
        first = index == 0  # no gradient for the images
        total += 2 * rows * into * out * (1 if first else 2)
        total += 2 * rows * into * out if rank == 0 else 0
        total += 2 * rows * (rank + constant) * (into + 2 * out + (0 if first else into)) + 2 * rows * rank * (
            into + out
        )
    return total


@pytest.mark.parametrize(("mode", "constant"), [("reset", 0), ("resetless", RANK)])
@pytest.mark.parametrize("heads", [1, 3])
def test_flops_per_image_of_a_step(mode: str, constant: int, heads: int) -> None:
    model, found = adapted(heads, mode)
    assert training_flops(model, found, TINY.image_size) == written_out(RANK, constant=constant)


def test_folded_resetless_costs_what_reset_costs() -> None:
    model, heads = adapted(mode="resetless")
    for layer in heads.linears.values():
        layer.folded = True
    assert training_flops(model, heads, TINY.image_size) == written_out(RANK)


def test_flops_of_full_rank_training() -> None:
    assert step_flops(build(TINY, CLASSES, seed=0), batch=2, image_size=TINY.image_size) == 2 * written_out(0)


def test_counting_flops_leaves_the_model_and_the_random_state_alone() -> None:
    model, heads = adapted()
    kept = {name: p.clone() for name, p in heads.parameters().items()}
    state = torch.get_rng_state()
    training_flops(model, heads, TINY.image_size)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in heads.parameters().items():
        assert parameter.grad is None
        assert torch.equal(parameter, kept[name])
    assert not any(module._forward_hooks for module in model.modules())


def really_saved(model: nn.Module, batch: int, *, bf16: bool) -> int:
    """Bytes of distinct storages that autograd saves in a real forward pass, parameters aside."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ours = {p.untyped_storage()._cdata for p in model.parameters()}
    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), keeping:
        model(torch.randn(batch, 1, 28, 28)).float()
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in ours)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_saved_activations_equal_those_of_a_real_pass(heads: int, bf16: bool) -> None:
    model, _ = adapted(heads)
    materialise(model, torch.device("cpu"))
    blocks = [parent.get_submodule(name) for parent, name in repeated_blocks(model)]
    assert len(blocks) == DEPTH
    counted = saved_activations(model, blocks, batch=4, image_size=28, bf16=bf16)
    # A real scalar or mask of a few bytes may be a Python number in the trace.
    assert counted.saved(checkpointed=False) == pytest.approx(really_saved(model, 4, bf16=bf16), rel=0.01)
    assert counted.inputs == (4 * TOKENS * WIDTH * 4,) * DEPTH
    assert counted.saved(checkpointed=True) == counted.outside + sum(counted.inputs) + max(counted.blocks)


WIDER = ModelConfig(name="vit_tiny_patch16_224", image_size=64, arguments={"embed_dim": 96, "depth": 3, "num_heads": 3})


def really_held(heads: int, *, bf16: bool, checkpointed: bool, base: str = "auto") -> tuple[int, int]:
    """Bytes planned for activations, and the most alive in a real training step beside parameters and gradients."""
    model = build(WIDER, CLASSES, seed=0)
    found = attach(model, AdaptersConfig(rank=8, alpha=8), range(heads), seed=0)
    for layer in found.linears.values() if base != "auto" else ():
        layer.base.quantise(base)
    blocks = [parent.get_submodule(name) for parent, name in repeated_blocks(model)]
    weights = {f"{name}.base.weight" for name in found.linears}
    planned = saved_activations(model, blocks, batch=8, image_size=64, bf16=bf16, gathered=weights)
    materialise(model, torch.device("cpu"))
    for layer in found.linears.values() if base == "auto" else ():
        layer.base.weight.data = layer.base.weight.data.to(torch.bfloat16 if bf16 else torch.float32)
    wrap_blocks(model, checkpoint_activations=checkpointed, compile=False)
    for parameter in found.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in found.parameters().values() if p.grad is not None]
    images = torch.randn(8, 3, 64, 64)
    with LiveBytes([images, *model.parameters(), *model.buffers(), *gradients]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(images).float()
        output.sum().backward()
    return planned.total(checkpointed=checkpointed), live.peak


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_activations_are_the_peak_of_a_real_step(heads: int, bf16: bool, checkpointed: bool) -> None:
    planned, held = really_held(heads, bf16=bf16, checkpointed=checkpointed)
    assert planned == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_the_peak_of_a_real_step_with_weights_decoded_in_it(base: str, checkpointed: bool) -> None:
    planned, held = really_held(1, bf16=True, checkpointed=checkpointed, base=base)
    assert planned == pytest.approx(held, rel=0.05)


def arrangement(
    layers: dict[str, Layer],
    topology: Topology,
    *,
    scope: str = "node",
    gather: str = "pass",
    mode: str = "reset",
    **merge: Any,
) -> Arrangement:
    config = Config(
        adapters=AdaptersConfig(mode=mode),
        base=BaseConfig(scope=scope, gather=gather),
        merge=MergeConfig(**merge),
        train=TrainConfig(precision="fp32"),
    )
    return Arrangement(Shapes(layers, 10), topology, config)


LAYERS = {
    "blocks.0.a": Layer(64, 32, 2, "blocks.0"),
    "blocks.1.a": Layer(40, 32, 16, "blocks.1"),
    "head": Layer(7, 64, 2),
}


@pytest.mark.parametrize(
    "topology",
    [
        Topology(nodes=2, ranks_per_node=4, heads_per_node=2),
        Topology(nodes=3, ranks_per_node=2, heads_per_node=6),
        Topology(nodes=4, ranks_per_node=1, heads_per_node=1),
        Topology(nodes=1, ranks_per_node=3, heads_per_node=3),
    ],
)
@pytest.mark.parametrize(("scope", "gather"), [("node", "pass"), ("global", "pass"), ("global", "node")])
def test_every_weight_is_owned_once(topology: Topology, scope: str, gather: str) -> None:
    a = arrangement(LAYERS, topology, scope=scope, gather=gather)
    copies = topology.nodes if scope == "node" else 1
    for name, layer in LAYERS.items():
        covered = torch.zeros(layer.values, dtype=torch.int)
        for rank in range(topology.world_size):
            start, stop = a.ownership(name, rank).own
            covered[start:stop] += 1
        assert (covered == copies).all()


def test_auto_takes_the_path_with_fewer_bytes() -> None:
    a = arrangement(LAYERS, Topology(nodes=2, ranks_per_node=2, heads_per_node=2))
    sent = {name: a.path_bytes(layer) for name, layer in LAYERS.items()}
    assert a.paths == {name: min(bytes_of, key=lambda path: bytes_of[path]) for name, bytes_of in sent.items()}
    assert set(a.paths.values()) == {"factor", "dense"}
    assert sent["blocks.0.a"] == {"factor": 4 * 1 * 2 * 2 * (64 + 32), "dense": 4 * 2 * 1 * 64 * 32 // 2}


def test_one_node_sends_nothing_between_nodes() -> None:
    a = arrangement(LAYERS, Topology(ranks_per_node=4, heads_per_node=4), scope="global", local_every=5)
    window = of_node(a, lambda a, rank: run_traffic(a, rank, a.config.merge.every))
    assert sum(window.values()) > 0
    assert {scope for scope, _ in window} == {"intra_node"}


def test_one_process_sends_nothing() -> None:
    a = arrangement(LAYERS, Topology())
    assert not step_traffic(a, 0)
    assert not merge_traffic(a, 0, everywhere=True)


def test_memory_by_hand() -> None:
    topology = Topology(nodes=2, ranks_per_node=2, heads_per_node=4)
    a = arrangement(LAYERS, topology, mode="resetless", local_every=5, outer="nesterov", path="dense")
    found = memory(a, activations=1000)
    weights = 32 * 32 + 20 * 32 + 4 * 64  # the larger half of the rows of each
    factors = 2 * (2 * 96 + 16 * 72 + 2 * 71)
    assert found.master == found.momentum == 4 * (weights + 10)
    assert found.compute_shards == found.products == 4 * weights
    assert found.factors == found.previous_factors == 4 * factors
    assert found.optimizer_state == 2 * found.gradients == 8 * (factors + 2 * 10)
    assert found.gathered == 4 * (64 * 32 + 40 * 32 + 8 * 64)  # both blocks and the head with a row of padding
    assert found.total == sum(getattr(found, name) for name in type(found).__dataclass_fields__)
    assert found.activations == 1000


@pytest.fixture(scope="module")
def vit_l() -> Plan:
    began = time.process_time()
    made = make_plan(load_config(VIT_L, []), nodes=8, ranks_per_node=8)
    assert time.process_time() - began < 60
    return made


def test_vit_l_on_64_gpus(vit_l: Plan) -> None:
    a = vit_l.arrangement
    assert a.shapes.values == 304_326_632  # timm's vit_large_patch16_224
    assert vit_l.full_rank_flops == pytest.approx(3 * 2 * 61.6e9, rel=0.01)  # 61.6 GMAC forward, timm's table of models
    assert 0.67 < vit_l.flops / vit_l.full_rank_flops < 1
    weights = a.shapes.values - a.shapes.replica_values
    assert set(a.paths.values()) == {"dense"}
    assert vit_l.global_merge["inter_node", "merge_dense"] == 2 * 7 * 4 * weights // 8
    assert not vit_l.step
    assert {scope for scope, _ in vit_l.local_merge} == {"intra_node"}
    lte, ddp, _, diloco = vit_l.methods
    assert ddp.sent_per_step["inter_node"] == 2 * 63 * 4 * a.shapes.values // 64
    assert lte.sent_per_step["inter_node"] == pytest.approx(diloco.sent_per_step["inter_node"], rel=0.01)
    assert ddp.memory["state"] == 16 * a.shapes.values
    assert sum(row.count for row in path_rows(a)) == len(a.shapes.layers) == 98


def test_the_page_and_the_object_say_the_same(vit_l: Plan) -> None:
    page = "\n".join(plan.lines(vit_l))
    found = json.loads(json.dumps(plan.as_object(vit_l)))
    assert found["memory_per_rank"]["total"] == vit_l.memory.total
    assert f"{vit_l.memory.total / 1e9:.2f} GB" in page
    assert "blocks.*.attn.qkv" in page
    assert "full-rank DiLoCo" in page
    assert max(map(len, page.splitlines())) <= 120


def command(tmp_path: Path, arguments: Sequence[str], text: str) -> int:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args([str(path), *arguments]))


SMALL = """
model: {name: vit_tiny_patch16_224, num_classes: 7, image_size: 28, channels: 1,
        arguments: {patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}}
adapters: {rank: 4, mode: resetless}
train: {batch_size: 8, ema_decay: 0.9}
"""


@pytest.mark.parametrize("overrides", [[], ["base.gather=window", "merge.local_every=10", "merge.outer=nesterov"]])
@pytest.mark.parametrize("heads", ["1", "2", "4"])
def test_the_command_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], heads: str
) -> None:
    arguments = [f"topology.heads_per_node={heads}", *overrides, "--json", "--nodes", "2", "--ranks-per-node", "2"]
    assert command(tmp_path, arguments, SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heads_per_node"] == int(heads)
    assert found["images_per_node_step"] == 8 * int(heads)
    parts = dict(found["memory_per_rank"])
    assert parts.pop("total") == sum(parts.values())


def test_the_command_prints_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, [], SMALL) == 0
    assert "Memory per rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_classes=0"], "model.num_classes"),
        (["--nodes", "0"], "--nodes: 0"),
        (["topology.heads_per_node=3", "--ranks-per-node", "4"], "heads_per_node"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        command(tmp_path, arguments, SMALL)
    assert "\n" not in str(error.value)


def test_planning_needs_no_memory_for_heads() -> None:
    """Factors, gradients and moments of 512 heads of ViT-B in one rank would fill 40 GB."""
    config = Config(model=ModelConfig(name="vit_base_patch16_224", num_classes=10), train=TrainConfig(batch_size=1))
    config = replace(config, topology=replace(config.topology, heads_per_node=512))
    made = make_plan(config, nodes=2, ranks_per_node=1)
    assert made.memory.factors == 512 * 4 * made.arrangement.shapes.factor_values > 9e9


def test_shapes_name_the_block_of_every_layer() -> None:
    _, heads = adapted()
    shapes = shapes_of(heads, ["blocks.0", "blocks.1"])
    assert shapes.layers["blocks.1.mlp.fc1"] == Layer(4 * WIDTH, WIDTH, RANK, "blocks.1")
    assert shapes.layers["head"].unit == ""
    assert shapes.values == sum(p.numel() for p in build(TINY, CLASSES, seed=0).parameters())
