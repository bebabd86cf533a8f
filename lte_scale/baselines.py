"""What full-rank training of the same model costs: DDP, ZeRO-3 over all ranks (FSDP), and DiLoCo.

All train with AdamW, in the same precision and on as many images per rank and step as the LTE run they are held
against. Formulas in docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lte_scale.arrangement import FP32
from lte_scale.collectives import Scope
from lte_scale.topology import Topology
from lte_scale.traffic import Links

_GRADIENT, _ADAMW = FP32, 2 * FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class FullRank:
    """A model without heads, and how it is trained.

    Attributes:
        values: parameters.
        blocks: parameters of each block; the rest is gathered with the model.
        activations: bytes with weights handed over in the compute type; `autocast` with those that autocast casts.
        every: steps between DiLoCo's outer steps.
        sent_gradient_bytes: of a gradient on its way to other ranks.
    """

    values: int
    blocks: tuple[int, ...]
    activations: int
    autocast_activations: int
    compute_bytes: int
    accumulate: int
    every: int
    moving_average: bool
    bucket_bytes: int
    sent_gradient_bytes: int = _GRADIENT

    @property
    def outside(self) -> int:
        return self.values - sum(self.blocks)

    @property
    def state(self) -> int:
        """Bytes per parameter of what every method keeps somewhere: value, gradient, moments, moving average."""
        return FP32 + _GRADIENT + _ADAMW + (FP32 if self.moving_average else 0)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train: bytes of one rank, and bytes that a node sends per step on average, by scope."""

    name: str
    memory: Mapping[str, int]
    sent_per_step: Mapping[Scope, float]

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())


def baselines(model: FullRank, topology: Topology) -> list[Method]:
    """DDP, FSDP and DiLoCo on this topology."""
    return [_ddp(model, topology), _fsdp(model, topology), _diloco(model, topology)]


def ddp_traffic(values: int, topology: Topology, *, gradient_bytes: int = _GRADIENT) -> dict[Scope, float]:
    """Bytes that a node sends per step of full-rank DDP, in fp32 unless said, for a model of so many parameters."""

    def step(links: Links) -> None:
        links.all_reduce(links.world, "gradient", gradient_bytes * values)

    return _per_step(topology, step)


def _ddp(m: FullRank, t: Topology) -> Method:
    memory = {"state": m.state * m.values, "activations": m.autocast_activations}
    return Method("full-rank DDP", memory, ddp_traffic(m.values, t, gradient_bytes=m.sent_gradient_bytes))


def _fsdp(m: FullRank, t: Topology) -> Method:
    memory = {"state": m.state * _part(m.values, t.world_size), **_sharding_memory(m)}
    return Method("full-rank FSDP", memory, _per_step(t, lambda links: _sharded_step(m, links, links.world)))


def _diloco(m: FullRank, t: Topology) -> Method:
    shard = _part(m.values, t.ranks_per_node)

    def outer_step(links: Links) -> None:
        links.all_reduce(links.peers, "outer", FP32 * shard)

    inner = _per_step(t, lambda links: _sharded_step(m, links, links.node))
    outer = _per_step(t, outer_step)
    memory = {
        "state": m.state * shard,
        "outer master and momentum": 2 * FP32 * shard,
        "outer message": min(FP32 * shard, m.bucket_bytes),
        **_sharding_memory(m),
    }
    return Method("full-rank DiLoCo", memory, {scope: inner[scope] + outer[scope] / m.every for scope in inner})


def _sharding_memory(m: FullRank) -> dict[str, int]:
    largest = sorted(m.blocks, reverse=True)
    return {
        "gathered": m.compute_bytes * (m.outside + sum(largest[:2])),
        "gradient of a block": _GRADIENT * max(m.blocks, default=0),
        "activations": m.activations,
    }


def _sharded_step(m: FullRank, links: Links, group: list[int]) -> None:
    """ZeRO-3: gathered for forward and for backward, gradients reduced, in every micro-step."""
    for _ in range(m.accumulate):
        for values in (m.outside, *m.blocks):
            part = _part(values, len(group))
            links.all_gather(group, "base", m.compute_bytes * part)
            links.all_gather(group, "base", m.compute_bytes * part)
            links.reduce_scatter(group, "gradient", m.sent_gradient_bytes * part * len(group))


def _per_step(topology: Topology, step: Callable[[Links], None]) -> dict[Scope, float]:
    sent: dict[Scope, float] = {"inter_node": 0.0, "intra_node": 0.0}
    for rank in topology.node_ranks(0):
        links = Links(topology, rank)
        step(links)
        for (scope, _), count in links.sent.items():
            sent[scope] += count
    return sent


def _part(values: int, ranks: int) -> int:
    return -(-values // ranks)
