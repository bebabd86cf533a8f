"""All figures of a plan: memory per rank, bytes per step, merge and image, paths and FLOPs, against full-rank training.

Needs no accelerator, no data and next to no memory: the model is traced with fake tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from lte_scale.arrangement import Arrangement
from lte_scale.baselines import FullRank, Method, baselines
from lte_scale.collectives import Scope
from lte_scale.config.schema import Config
from lte_scale.cost import saved_activations, shapes_of, step_flops, training_flops
from lte_scale.engines.base import repeated_blocks
from lte_scale.link import dense_from
from lte_scale.memory import Memory, memory
from lte_scale.model import Heads, attach, build
from lte_scale.topology import Topology
from lte_scale.traffic import (
    Traffic,
    by_scope,
    gather_traffic,
    merge_traffic,
    of_node,
    region_traffic,
    step_traffic,
    window_traffic,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All figures. Traffic is the sum over the ranks of one node, memory that of one rank.

    Attributes:
        gather: gathering the base once.
        window: `merge.every` steps with their merges, when windows have grown to that.
        methods: LTE first, then what it is held against.
        full_rank: what the others train.
    """

    arrangement: Arrangement
    flops: int
    full_rank_flops: int
    memory: Memory
    activations: Mapping[str, int]
    step: Traffic
    gather: Traffic
    local_merge: Traffic
    region_merge: Traffic
    global_merge: Traffic
    window: Traffic
    methods: list[Method]
    full_rank: FullRank

    @property
    def images_per_node_step(self) -> int:
        train = self.arrangement.config.train
        return self.arrangement.topology.heads_per_node * train.batch_size * train.accumulate

    def per_image(self, scope: Scope) -> float:
        return by_scope(self.window)[scope] / self.arrangement.config.merge.every / self.images_per_node_step


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model with the heads of one rank, on the meta device, and the blocks that are gathered and recomputed."""

    model: nn.Module
    heads: Heads
    blocks: dict[str, nn.Module]


class Traces:
    """What tracing a model tells, for variants of one configuration on any topology.

    Variants may differ in all but `model` and `adapters`. A trace takes seconds for a large model, and is kept.
    """

    def __init__(self, config: Config) -> None:
        """
        Raises:
            ValueError: if the number of classes is not known.
        """
        self.config, self.classes = config, _classes(config)
        self._adapted: dict[tuple[int, str], Adapted] = {}
        self._activations: dict[tuple[int, int, bool, bool, str], dict[str, int]] = {}

    def arrangement(self, config: Config, *, nodes: int, ranks_per_node: int) -> Arrangement:
        """
        Raises:
            ValueError: if the model cannot be built or adapted.
        """
        heads_per_node = config.topology.heads_per_node or ranks_per_node
        topology = Topology(
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            heads_per_node=heads_per_node,
            nodes_per_region=config.topology.nodes_per_region,
        )
        topology = topology.among(config.fault_tolerance)
        # Shapes are those of one head: any number of them will do.
        adapted = next(iter(self._adapted.values()), None) or self._with_heads(topology.heads_per_rank, "")
        return Arrangement(shapes_of(adapted.heads, list(adapted.blocks)), topology, config)

    def adapted(self, a: Arrangement) -> Adapted:
        """The model as rank 0 computes with it."""
        adapted = self._with_heads(a.topology.heads_per_rank, _quantised(a.config))
        for layer in adapted.heads.linears.values():
            layer.folded = a.folded
        return adapted

    def activations(self, a: Arrangement) -> dict[str, int]:
        """Bytes, `kept` and `checkpointed`."""
        images = _images_per_rank(a.config, a.topology)
        key = (a.topology.heads_per_rank, images, a.config.train.bf16, a.folded, _quantised(a.config))
        if key not in self._activations:
            adapted = self.adapted(a)
            blocks = list(adapted.blocks.values())
            self._activations[key] = _activations(a.config, a.topology, adapted.model, blocks, adapted.heads)
        return self._activations[key]

    def memory(self, a: Arrangement) -> Memory:
        """What rank 0 holds at most."""
        kept = "checkpointed" if a.config.train.checkpoint_activations else "kept"
        return memory(a, activations=self.activations(a)[kept])

    def _with_heads(self, heads_per_rank: int, quantised: str) -> Adapted:
        key = heads_per_rank, quantised
        if key not in self._adapted:
            model = build(self.config.model, self.classes, seed=self.config.seed)
            with torch.device("meta"):
                heads = attach(model, self.config.adapters, range(heads_per_rank), seed=self.config.seed)
            for layer in heads.linears.values() if quantised else ():
                layer.base.quantise(quantised)
            self._adapted[key] = Adapted(model, heads, _blocks(model))
        return self._adapted[key]


def _quantised(config: Config) -> str:
    """The precision in which the base is held, if in few bits."""
    return config.base.precision if config.base.quantised else ""


def make_plan(config: Config, *, nodes: int, ranks_per_node: int, traces: Traces | None = None) -> Plan:
    """Plan `config` for `nodes` x `ranks_per_node` ranks.

    Args:
        traces: of a variant of `config`.

    Raises:
        ValueError: if the model cannot be built or adapted, or its number of classes is not known.
    """
    traces = traces or Traces(config)
    a = traces.arrangement(config, nodes=nodes, ranks_per_node=ranks_per_node)
    topology, activations, spent = a.topology, traces.activations(a), traces.memory(a)
    adapted = traces.adapted(a)
    grown = replace(a, config=replace(config, merge=replace(config.merge, growth=0.0)))
    window = of_node(grown, window_traffic)
    full_rank, full_rank_flops = _full_rank(config, topology, traces.classes, list(adapted.blocks), adapted.heads)
    average = {scope: sent / config.merge.every for scope, sent in by_scope(window).items()}
    return Plan(
        arrangement=a,
        flops=training_flops(adapted.model, adapted.heads, config.model.image_size),
        full_rank_flops=full_rank_flops,
        memory=spent,
        activations=activations,
        step=of_node(a, step_traffic),
        gather=of_node(a, gather_traffic),
        local_merge=of_node(a, lambda a, rank: merge_traffic(a, rank, everywhere=False)) if a.two_level else Traffic(),
        region_merge=of_node(a, _region_merge) if a.cadence.region_every else Traffic(),
        global_merge=of_node(a, lambda a, rank: merge_traffic(a, rank, everywhere=True)),
        window=window,
        methods=[Method("LTE", asdict(spent), average), *baselines(full_rank, topology.whole)],
        full_rank=full_rank,
    )


def _region_merge(a: Arrangement, rank: int) -> Traffic:
    inside = merge_traffic(a, rank, everywhere=False)
    return inside + region_traffic(a, rank, range(a.cadence.fragments), replicas=True)


def _classes(config: Config) -> int:
    if config.model.num_classes:
        return config.model.num_classes
    reason = "data.train is not set"
    if config.data.train:
        from lte_scale.data import open_index

        try:
            return int(open_index(config.data.train, allow_pipe=config.data.allow_pipe).num_classes)
        except (ValueError, OSError) as error:
            reason = str(error)
    raise ValueError(f"model.num_classes: 0, and no index of shards to take it from ({reason}); set it for plan")


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that are gathered and recomputed one by one, by name."""
    blocks = {parent.get_submodule(name) for parent, name in repeated_blocks(model)}
    return {name: module for name, module in model.named_modules() if module in blocks}


def _images_per_rank(config: Config, topology: Topology) -> int:
    return max(1, topology.heads_per_rank * config.train.batch_size // topology.ranks_per_head)


def _weights(heads: Heads) -> set[str]:
    return {f"{name}.base.weight" for name in heads.linears}


def _activations(
    config: Config, topology: Topology, model: nn.Module, blocks: list[nn.Module], heads: Heads
) -> dict[str, int]:
    saved = saved_activations(
        model,
        blocks,
        batch=_images_per_rank(config, topology),
        image_size=config.model.image_size,
        bf16=config.train.bf16,
        gathered=_weights(heads),
    )
    return {"kept": saved.total(checkpointed=False), "checkpointed": saved.total(checkpointed=True)}


def _full_rank(
    config: Config, topology: Topology, classes: int, blocks: list[str], heads: Heads
) -> tuple[FullRank, int]:
    model = build(config.model, classes, seed=config.seed)
    modules = [model.get_submodule(name) for name in blocks]
    bf16, checkpointed = config.train.bf16, config.train.checkpoint_activations
    gathered, cast = (
        saved_activations(
            model,
            modules,
            batch=_images_per_rank(config, topology),
            image_size=config.model.image_size,
            bf16=bf16,
            gathered=names,
        ).total(checkpointed=checkpointed)
        for names in (_weights(heads), ())
    )
    full_rank = FullRank(
        values=_numel(model),
        blocks=tuple(_numel(module) for module in modules),
        activations=gathered,
        autocast_activations=cast,
        compute_bytes=2 if bf16 else 4,
        accumulate=config.train.accumulate,
        every=config.merge.every,
        moving_average=config.train.ema_decay > 0,
        bucket_bytes=int(config.merge.bucket_mb * 1e6),
    )
    return full_rank, step_flops(model, batch=1, image_size=config.model.image_size)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, slots=True)
class PathRow:
    """Layers of one kind: how they travel between nodes, and what each path would send per node and merge.

    Attributes:
        dense_from: the number of nodes from which the dense path sends no more than the factor path.
    """

    layers: str
    out: int
    into: int
    rank: int
    path: str
    count: int
    factor_bytes: int
    dense_bytes: int
    dense_from: int


def path_rows(a: Arrangement) -> list[PathRow]:
    """Layers grouped by name, numbers aside, and shape."""
    groups = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), replace(layer, unit=""), a.paths[name])
        for name, layer in a.shapes.layers.items()
    )
    rows = []
    for (name, layer, path), count in groups.items():
        sent = a.path_bytes(layer)
        rows.append(
            PathRow(
                layers=name,
                out=layer.out,
                into=layer.into,
                rank=layer.rank,
                path=path,
                count=count,
                factor_bytes=count * sent["factor"],
                dense_bytes=count * sent["dense"],
                dense_from=dense_from(a, layer),
            )
        )
    return rows
