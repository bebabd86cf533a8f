"""From a timm model to a sharded, initialised one: the order of all wrappers is written here, once."""

from __future__ import annotations

import torch
from torch import nn

from lte_scale.collectives import Collectives
from lte_scale.config.schema import Config
from lte_scale.engines.base import Engine, SingleEngine, fill_base, wrap_blocks
from lte_scale.engines.fsdp import FSDPEngine
from lte_scale.model import Heads


def build_engine(
    model: nn.Module, heads: Heads, config: Config, collectives: Collectives, device: torch.device
) -> Engine:
    """Wrap, shard, materialise and initialise `model`. Order: heads (done), checkpointing, compile, shard, fill."""
    blocks = wrap_blocks(
        model, checkpoint_activations=config.train.checkpoint_activations, compile=config.train.compile
    )
    engine: Engine
    if config.engine.name == "fsdp":
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        engine = FSDPEngine(
            model, heads, blocks, collectives, config.base, device=device, compute_dtype=dtype
        )
    else:
        engine = SingleEngine(model, heads, device)
    fill_base(engine, heads, rank=collectives.topology.rank, seed=config.seed)
    return engine
