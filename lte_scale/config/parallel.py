"""Sections on where heads and weights are and how heads become one: topology, base, engine, merge."""

from __future__ import annotations

from dataclasses import dataclass

from lte_scale.cadence import Cadence
from lte_scale.config.options import option

SENT = ("fp32", "bf16", "int8", "int4")
"""What values between nodes can be sent in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyConfig:
    """Where the heads are."""

    heads_per_node: int = option(
        0, "Heads in a node; 0 means one per rank. Divides the ranks of a node, or is a multiple of them.", least=0
    )
    nodes_per_region: int = option(
        0,
        "Neighbouring nodes that make a region (a rack, a data centre) and merge among themselves every "
        "`merge.region_every` steps; divides the nodes. 0: no regions.",
        least=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseConfig:
    """The frozen dense weights: how they are sharded and gathered."""

    scope: str = option(
        "node",
        "node: sharded inside a node, one copy per node; global: sharded over all ranks of all nodes.",
        one_of=("node", "global"),
    )
    gather: str = option(
        "pass",
        "pass: gathered in every forward and backward; node: as pass, from a copy sharded inside the node; "
        "window: gathered once per window by every rank.",
        one_of=("pass", "node", "window"),
    )
    offload: str = option(
        "none",
        "cpu: this rank's parts of the weights are kept in CPU memory and copied to the accelerator on use.",
        one_of=("none", "cpu"),
    )
    precision: str = option(
        "auto",
        "auto: products read weights held in their own precision; int8, nf4: in 8 or 4 bits with a scale for 64 "
        "values, decoded for each product, beside the fp32 parts that merges add to (docs/engines.md).",
        one_of=("auto", "int8", "nf4"),
    )

    @property
    def quantised(self) -> bool:
        """Whether weights are held in other values than those of the master."""
        return self.precision != "auto"

    @property
    def crosses_nodes(self) -> bool:
        """Whether weights are gathered from all nodes in every pass."""
        return self.scope == "global" and self.gather == "pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What shards the base. `engine: fsdp` is short for `engine: {name: fsdp}`."""

    name: str = option(
        "fsdp",
        "fsdp: PyTorch FSDP2; deepspeed: ZeRO-3; none: a single process, nothing sharded.",
        one_of=("fsdp", "deepspeed", "none"),
    )
    deepspeed_config: str = option(
        "", "JSON file merged over the DeepSpeed configuration that is generated from this one (engine deepspeed)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """When and how heads are merged into the base."""

    every: int = option(50, "Optimizer steps T between global merges.", least=1)
    local_every: int = option(
        0, "Steps between merges inside a node; divides `every` and `region_every`; 0 means the same.", least=0
    )
    region_every: int = option(
        0,
        "Steps between merges inside a region (`topology.nodes_per_region`): its nodes go on from the mean of their "
        "weights; divides `every` and the steps between two fragments. 0: no regions.",
        least=0,
    )
    region_precision: str = option(
        "fp32",
        "What crosses between the nodes of a region at its merges, as `precision`.",
        one_of=SENT,
    )
    growth: float = option(
        0.0,
        "How windows grow: none is longer than this share of the steps before it, until they have `every` steps. The "
        "early ones merge all layers at once, and everybody waits for it. 0: all have `every`; else at least 0.01.",
        least=0,
        most=1,
    )
    delay: int = option(
        0,
        "Steps a global merge takes: the exchange between nodes runs beside so many steps of training, in which a "
        "node goes on from its own weights, and is applied after them. 0: everybody waits for it. Less than "
        "`local_every` and than the steps between two fragments.",
        least=0,
    )
    fragments: int = option(
        1,
        "Parts of the model, of about equal size, whose global merges are spread evenly over the window; divides "
        "`every`.",
        least=1,
    )
    path: str = option(
        "auto",
        "factor: exchange A and B between nodes; dense: reduce their product; auto: per layer, what sends fewer bytes.",
        one_of=("auto", "factor", "dense"),
    )
    precision: str = option(
        "fp32",
        "What crosses between nodes at a global merge: fp32, bf16, or int8 or int4 with a scale for 64 values. What a "
        "message misses goes with a later one, but for rounding A, on the factor path under `reset` (8 bits or more).",
        one_of=SENT,
    )
    tune: bool = option(
        False,
        "Measure a step and the link between nodes before a run's first step, and take from there the `precision`, "
        "`fragments` and `delay` with which steps wait less than 1 % of their time for it, at the least loss (what "
        "`plan --suggest` does with figures of yours). A run that is resumed keeps them.",
    )
    outer: str = option("average", "Outer optimizer over a window's change.", one_of=("average", "nesterov"))
    outer_lr: float = option(1.0, "Learning rate of the Nesterov outer optimizer.", above=0)
    outer_momentum: float = option(0.9, "Momentum of the Nesterov outer optimizer.", least=0, most=0.9999)
    weight_decay: float = option(
        0.0,
        "Decoupled decay of the master: a window multiplies it by 1 - weight_decay * (sum of its learning rates).",
        least=0,
    )
    optimizer_state: str = option(
        "keep",
        "The heads' optimizer state at a merge: kept, all reset, or that of B alone reset.",
        one_of=("keep", "reset", "reset_b"),
    )
    bucket_mb: float = option(64.0, "Upper size of one exchanged message, in MB, unless one layer is larger.", above=0)

    @property
    def cadence(self) -> Cadence:
        local = self.local_every or self.region_every or self.every
        return Cadence(self.every, local, self.fragments, self.delay, self.growth, self.region_every)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultToleranceConfig:
    """Nodes that are jobs of their own and outlive one another (docs/reliability.md)."""

    enabled: bool = option(
        False,
        "Every node is a job of its own, with a run_dir of its own, and merges with those that are there (torchft).",
    )
    lighthouse: str = option("", "Address of torchft's lighthouse, as http://head:29510.")
    nodes: int = option(1, "Nodes of the whole run, among which its data is divided.", least=1)
    node: int = option(0, "The number of this node, from 0.", least=0)
    wait_seconds: float = option(60.0, "Seconds to wait at the start for nodes that are not there yet.", least=0)
    timeout_seconds: float = option(
        60.0, "Seconds after which an exchange is tried again without a node that does not answer.", above=0
    )
