"""Where a rank's bytes lie: every tensor that LTE keeps, by what it is for, as arithmetic. Formulas in docs/plan.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from lte_scale.arrangement import FP32, Arrangement, Bucket, length
from lte_scale.config.deepspeed import PREFETCHED
from lte_scale.moments import moment_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank's accelerator (the rank that holds the largest parts), by what they are for.

    Attributes:
        cpu: what `base.offload: cpu` keeps in CPU memory instead; not in the total.
    """

    master: int
    momentum: int = 0
    moving_average: int = 0
    compute_shards: int = 0
    partitions: int = 0
    gathered: int = 0
    factors: int = 0
    previous_factors: int = 0
    products: int = 0
    replicas: int = 0
    gradients: int
    optimizer_state: int
    activations: int
    merge_history: int = 0
    unsent: int = 0
    merge_buffers: int = 0
    under_way: int = 0
    cpu: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.cpu


def memory(a: Arrangement, *, activations: int) -> Memory:
    """What rank 0 holds at most; formulas in docs/plan.md."""
    layers, t, config = a.shapes.layers, a.topology, a.config
    held = {name: a.ownership(name, 0) for name in layers}
    own = sum(length(ownership.own) for ownership in held.values())
    compute = sum(length(ownership.compute) for ownership in held.values())
    beside = {"none": False, "fsdp": config.base.quantised, "deepspeed": config.train.bf16}[config.engine.name]
    weights = {
        "master": FP32 * own,
        "momentum": FP32 * own if config.merge.outer == "nesterov" else 0,
        "moving_average": FP32 * own if config.train.ema_decay else 0,
        "compute_shards": FP32 * compute if a.separate else 0,
        "partitions": sum(map(a.part_bytes, layers)) if beside else 0,
        "products": FP32 * _product_values(a) if a.resetless else 0,
    }
    offloaded = config.base.offload == "cpu"
    kept = dict.fromkeys(weights, 0) if offloaded else weights
    replicas = FP32 * a.shapes.replica_values
    factors = t.heads_per_rank * a.shapes.factor_values
    trained, held_in = t.heads_per_rank * a.shapes.trainable_values, config.optimizer.moments
    return Memory(
        master=kept["master"] + replicas,
        momentum=kept["momentum"] + (replicas if config.merge.outer == "nesterov" else 0),
        moving_average=kept["moving_average"] + (replicas if config.train.ema_decay else 0),
        compute_shards=kept["compute_shards"],
        partitions=kept["partitions"],
        gathered=_gathered_bytes(a),
        factors=FP32 * factors,
        previous_factors=FP32 * factors if a.resetless else 0,
        products=kept["products"],
        replicas=FP32 * t.heads_per_rank * a.shapes.replica_values,
        gradients=FP32 * trained,
        optimizer_state=2 * moment_bytes(held_in, trained),
        # Moments are in fp32 during a step, when activations are not there.
        activations=max(activations, 0 if held_in == "fp32" else 2 * FP32 * trained),
        merge_history=FP32 * _history_values(a),
        unsent=FP32 * unsent_values(a, 0),
        merge_buffers=FP32 * max((_buffer_values(a, bucket) for bucket in a.buckets), default=0),
        under_way=FP32 * _values_under_way(a),
        cpu=sum(weights.values()) if offloaded else 0,
    )


def _gathered_bytes(a: Arrangement) -> int:
    units = a.units()
    if a.config.engine.name == "none":
        return 0 if a.held.exact and a.config.base.offload == "none" else sum(units.values())
    if a.config.base.gather == "window":
        return sum(units.values())
    if a.config.engine.name == "deepspeed":
        largest = max(map(a.part_bytes, a.shapes.layers)) * a.engine_ranks
        return min(sum(units.values()), largest + a.held.size(PREFETCHED))
    blocks = sorted((size for unit, size in units.items() if unit), reverse=True)
    return units.get("", 0) + sum(blocks[:2])  # the block at work, and the next one on its way


def _product_values(a: Arrangement) -> int:
    total = 0
    for bucket in a.buckets:
        if a.folded or a.roaming or bucket.path == "dense":
            total += a.formed(bucket, 0)
        if bucket.path == "factor":
            total += sum(length(a.ownership(name, 0).own) for name in bucket.names)
    return total


def _history_values(a: Arrangement) -> int:
    kept = (a.merges_sent - 1) * a.topology.heads_per_rank
    return sum(kept * sum(a.head_parts(bucket)) for bucket in a.buckets if bucket.path == "factor")


def unsent_values(a: Arrangement, rank: int) -> int:
    """What messages in less than fp32 have missed: a row for each peer, and the mean of the own part."""
    total, nodes, region = 0, a.topology.nodes, a.topology.region_size
    if not a.codec.exact:
        dense = sum(a.padded_parts(bucket, rank) for bucket in a.buckets if bucket.path == "dense")
        total += dense * (nodes + (not a.spread)) + -(-a.replica_part // nodes) * (nodes + 1)
    if not a.region_codec.exact:
        total += (region + 1) * sum(a.padded_parts(bucket, rank, regional=True) for bucket in a.buckets)
    return total


def _values_under_way(a: Arrangement) -> int:
    """What an exchange beside the training holds: what is sent and what has arrived, of the largest fragment.

    Nodes apart hold it of the whole window: nothing is applied until all has arrived.
    """
    if a.config.fault_tolerance.enabled:
        return 2 * (sum(length(a.ownership(name, 0).own) for name in a.shapes.layers) + a.replica_part)
    if not a.cadence.delay:
        return 0
    held: Counter[int] = Counter({0: 3 * a.replica_part})
    for bucket in a.buckets:
        part = a.merges_sent * a.topology.heads_per_rank * sum(a.head_parts(bucket))
        held[bucket.fragment] += 2 * a.formed(bucket, 0) if bucket.path == "dense" else (1 + a.topology.nodes) * part
    return max(held.values())


def _buffer_values(a: Arrangement, bucket: Bucket) -> int:
    """Sent, received and reordered factors, and the products formed from them, twice (a message is a copy).

    In less than fp32 what is received comes decoded besides.
    """
    t = a.topology
    sets = t.nodes * a.merges_sent if bucket.path == "factor" else 1
    part = t.heads_per_rank * sum(a.head_parts(bucket))
    received = sets * part * t.ranks_per_node
    if bucket.path == "factor":
        changes = sum(length(a.ownership(name, 0).own) for name in bucket.names)
        return a.merges_sent * part + sets * part + (2 if a.codec.exact else 3) * received + changes
    message = a.formed(bucket, 0)
    if a.spread or not a.codec.exact:
        message = t.nodes * a.padded_parts(bucket, 0) * (1 if a.codec.exact else 2)
    return part + 2 * received + a.formed(bucket, 0) + message
