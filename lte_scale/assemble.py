"""From a configuration to a sharded model with heads, its merge and its optimizer: the order is written here, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lte_scale.adapters import ReplicaNorm
from lte_scale.apart import MergerApart
from lte_scale.apex import layer_norm
from lte_scale.arrangement import Arrangement
from lte_scale.collectives import Collectives
from lte_scale.config.deepspeed import settings
from lte_scale.config.methods import translated
from lte_scale.config.schema import Config
from lte_scale.cost import shapes_of, training_flops
from lte_scale.data import TrainStream
from lte_scale.engines.base import Engine, SingleEngine, fill_base, wrap_blocks
from lte_scale.engines.deepspeed import DeepSpeedEngine
from lte_scale.engines.fsdp import FSDPEngine
from lte_scale.index import ShardIndex
from lte_scale.merge import Merger
from lte_scale.model import Heads, attach, build
from lte_scale.optim import HeadOptimizer
from lte_scale.precision import with_precision
from lte_scale.scaling_rule import dense_equivalent_scale, rate_of_a
from lte_scale.topology import Topology, from_environment


@dataclass(frozen=True)
class LTE:
    """What a training loop needs: call `model` under `autocast`, step `optimizer`, and `merger` when it is due."""

    heads: Heads
    engine: Engine
    merger: Merger
    optimizer: HeadOptimizer
    autocast: torch.autocast

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The model of the last global merge, in evaluation mode."""
        with self.merger.merged():
            self.model.eval()
            yield self.model
            self.model.train()


def assemble(config: Config, num_classes: int, collectives: Collectives, device: torch.device) -> LTE:
    """Build, attach heads, wrap (checkpointing, compile, shard), materialise, fill.

    Raises:
        ValueError: for a model that timm does not have or LTE cannot train.
    """
    norm = layer_norm(config.train.norm, device, compiled=config.train.compile)
    model = build(config.model, num_classes, seed=config.seed)
    if device.type == "cpu":
        _plain_attention(model)
    alike = config.optimizer.average == "all"
    heads = attach(model, config.adapters, collectives.topology.my_heads, seed=config.seed, alike=alike)
    arrangement = Arrangement(shapes_of(heads), collectives.topology, config)
    for layer in heads.linears.values():
        layer.folded = arrangement.folded
        if config.base.quantised:
            layer.base.quantise(config.base.precision)
        if not config.adapters.alpha:
            layer.scale = dense_equivalent_scale(1 if alike else collectives.topology.heads)
    for module in model.modules():
        if isinstance(module, ReplicaNorm):
            module.layer_norm = norm
    blocks = wrap_blocks(
        model, checkpoint_activations=config.train.checkpoint_activations, compile=config.train.compile
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16)
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    engine: Engine
    if config.engine.name == "none" or not heads.linears:  # without a base there is nothing to shard
        engine = SingleEngine(model, heads, config.base, device=device, compute_dtype=dtype)
    elif config.engine.name == "fsdp":
        engine = FSDPEngine(model, heads, blocks, collectives, config.base, device=device, compute_dtype=dtype)
    else:
        json = settings(config, collectives.topology)
        engine = DeepSpeedEngine(model, heads, collectives, config.base, json, device=device, compute_dtype=dtype)
    fill_base(engine, heads, rank=collectives.topology.rank, seed=config.seed)
    kind = MergerApart if config.fault_tolerance.enabled else Merger
    merger = kind(heads, engine, collectives, arrangement)
    lr_of_a = None
    if not config.adapters.alpha:
        window = config.merge.cadence.local_every
        lr_of_a = rate_of_a(config.optimizer.lr, rank=config.adapters.rank, window=window)
    optimizer = HeadOptimizer(heads, config.optimizer, collectives, lr_of_a=lr_of_a, passes=config.train.accumulate)
    return LTE(heads, engine, merger, optimizer, autocast)


def train_stream(config: Config, index: ShardIndex, num_classes: int, topology: Topology) -> TrainStream:
    """The training batches of a rank: of its heads, or its part of those of a head that it shares.

    Raises:
        ValueError: if the data cannot be divided so.
    """
    return TrainStream(
        index,
        heads=topology.my_heads,
        total_heads=topology.heads,
        member=topology.head_member,
        members=topology.ranks_per_head,
        batch_size=config.train.batch_size,
        seed=config.seed,
        image_size=config.model.image_size,
        channels=config.model.channels,
        num_classes=num_classes,
        augment=config.augment,
        data=config.data,
    )


def flops_per_image(config: Config, num_classes: int, topology: Topology) -> int:
    """FLOPs of training on one image. Counted on a model of its own, in a second or two."""
    model = build(config.model, num_classes, seed=config.seed)
    heads = attach(model, config.adapters, topology.my_heads, seed=config.seed)
    return training_flops(model, heads, config.model.image_size)


def _plain_attention(model: nn.Module) -> None:
    """PyTorch's fused attention is slow in backward on a CPU: 30 ms against 8 for 32 images in 4 blocks of width 64."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]


def adapt(config: Config, num_classes: int, device: str | torch.device = "cpu") -> LTE:
    """`assemble` for a loop of one's own, on the ranks that torchrun started or in one process."""
    device = torch.device(device)
    topology = from_environment(config.topology.heads_per_node, nodes_per_region=config.topology.nodes_per_region)
    return assemble(
        translated(with_precision(config, device)), num_classes, Collectives(topology, device=device), device
    )
