"""What training asks of a node's network link: seconds on it, the rate it must have, and how long steps wait for it.

A link carries so many Gbit/s in each direction, and all that leaves a node goes through it. Bytes are those of
`traffic` and `baselines`. Two kinds of them differ in how they can be hidden:

    of a step        DDP's gradients, FSDP's gathers: at best under the same step's computation, all of it
    of an exchange   merges and outer steps: under `delay` steps of computation; with 0 every step waits

Formulas in docs/plan.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lte_scale.arrangement import Arrangement
from lte_scale.baselines import FullRank, baselines
from lte_scale.cost import Layer
from lte_scale.traffic import Traffic, by_scope, fragment_traffic, of_node, region_traffic, step_traffic, times

PAYLOAD_SHARE = 0.95
"""Of what a link carries, the rest being headers: TCP over IPv4 in Ethernet frames of 1514 bytes has 1448 of data."""

_BF16 = 2
_MOST_NODES = 1 << 30


@dataclass(frozen=True, slots=True)
class Link:
    """A node's network link of `gbit` Gbit/s, headers included, in each direction."""

    gbit: float

    def seconds(self, sent: float) -> float:
        """Time that so many bytes of payload take."""
        return gigabits(sent) / self.gbit


def gigabits(sent: float) -> float:
    """What so many bytes of payload are on a link, in Gbit, headers included."""
    return 8e-9 * sent / PAYLOAD_SHARE


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes that leave a node in every step, and in the exchanges of one window of `every` steps.

    Attributes:
        parts: those of each exchange, where there are several and their sizes are known.
        waited_bytes: of a window's merges that no step runs beside: those inside regions.
    """

    name: str
    step_bytes: float
    exchange_bytes: float
    every: int
    parts: tuple[float, ...] = ()
    waited_bytes: float = 0.0

    @property
    def window_bytes(self) -> float:
        return self.step_bytes * self.every + self.exchange_bytes + self.waited_bytes

    def exchanges(self, fragments: int) -> tuple[float, ...]:
        """The bytes of each exchange of a window: `parts` where they are known, else so many of equal size."""
        return self.parts or (self.exchange_bytes / fragments,) * fragments


def lte_demand(a: Arrangement) -> Demand:
    """What LTE sends: its merges between nodes, and in every step what `base.scope: global` gathers from all nodes."""
    step = by_scope(of_node(a, step_traffic))["inter_node"]
    parts = tuple(_fragment_bytes(a, fragment) for fragment in range(a.cadence.fragments))
    in_regions = by_scope(of_node(a, _region_bytes))["inter_node"] if a.cadence.region_every else 0
    return Demand("LTE", step, sum(parts), a.cadence.every, parts if len(parts) > 1 else (), in_regions)


def _region_bytes(a: Arrangement, rank: int) -> Traffic:
    """Of a window, in which the last merge of every fragment is one of all nodes."""
    once = region_traffic(a, rank, range(a.cadence.fragments), replicas=True)
    return times(once, a.cadence.every // a.cadence.region_every - 1)


def _fragment_bytes(a: Arrangement, fragment: int) -> int:
    return by_scope(of_node(a, lambda a, rank: fragment_traffic(a, rank, fragment)))["inter_node"]


def full_rank_demands(model: FullRank, a: Arrangement) -> Iterator[Demand]:
    """What DDP, FSDP and DiLoCo send with bf16 gradients; DiLoCo's exchange is of fp32 changes, once in a window."""
    ddp, fsdp, diloco = baselines(replace(model, sent_gradient_bytes=_BF16), a.topology)
    for method in (ddp, fsdp):
        yield Demand(method.name, method.sent_per_step["inter_node"], 0.0, model.every)
    yield Demand(diloco.name, 0.0, diloco.sent_per_step["inter_node"] * model.every, model.every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a `Demand` does to a link. Seconds, and Gbit/s with headers; None where it depends on an unknown step time.

    Attributes:
        link_seconds: on the link, of a window's exchanges or, where there are none, of a step.
        average_gbit: over a window.
        peak_gbit: what the link must carry for nothing to wait; None with a delay of 0 too, as no rate is enough.
        stall_seconds: what the steps of a window wait in all.
        stall_share: the same, of the time that these steps take without it.
    """

    name: str
    step_bytes: float
    exchange_bytes: float
    window_bytes: float
    link_seconds: float
    average_gbit: float | None
    peak_gbit: float | None
    stall_seconds: float | None
    stall_share: float | None


def predict(
    demand: Demand, link: Link, *, step_seconds: float | None = None, delay: int = 0, fragments: int = 1
) -> Prediction:
    """What becomes of `demand` on `link`, for steps of `step_seconds` each without waiting.

    Args:
        delay: steps that run while an exchange is under way (`merge.delay`).
        fragments: exchanges of a window, at different times (`merge.fragments`).
    """
    average = peak = stall = share = None
    if step_seconds is not None:
        computing = demand.every * step_seconds
        average = gigabits(demand.window_bytes) / computing
        peak = _peak(demand, step_seconds, delay, fragments)
        stall = demand.every * max(0.0, link.seconds(demand.step_bytes) - step_seconds)
        stall += exchange_stall(demand, link, step_seconds=step_seconds, delay=delay, fragments=fragments)
        share = stall / computing
    return Prediction(
        name=demand.name,
        step_bytes=demand.step_bytes,
        exchange_bytes=demand.exchange_bytes,
        window_bytes=demand.window_bytes,
        link_seconds=link.seconds(demand.exchange_bytes or demand.step_bytes),
        average_gbit=average,
        peak_gbit=peak,
        stall_seconds=stall,
        stall_share=share,
    )


def exchange_stall(demand: Demand, link: Link, *, step_seconds: float, delay: int = 0, fragments: int = 1) -> float:
    """Seconds that the steps of a window wait for its exchanges: for each what `delay` steps do not hide."""
    exposed = sum(max(0.0, link.seconds(part) - delay * step_seconds) for part in demand.exchanges(fragments))
    return exposed + link.seconds(demand.waited_bytes)


def _peak(demand: Demand, step_seconds: float, delay: int, fragments: int) -> float | None:
    rate = gigabits(demand.step_bytes) / step_seconds
    if not demand.exchange_bytes:
        return rate
    return rate + gigabits(max(demand.exchanges(fragments))) / (delay * step_seconds) if delay else None


def hiding_delay(demand: Demand, link: Link, *, step_seconds: float, fragments: int = 1) -> int:
    """The smallest delay, in steps, with which no step waits for an exchange."""
    steps = link.seconds(max(demand.exchanges(fragments))) / step_seconds
    return math.ceil(round(steps, 9))  # a last bit must not make it a step more


def longest_delay(a: Arrangement) -> int:
    """The largest delay that a configuration has room for: heads are not merged while an exchange is under way."""
    return 0 if a.spread else a.cadence.longest_delay  # spread, a node has no weights of its own to go on from


def dense_from(a: Arrangement, layer: Layer) -> int:
    """The number of nodes, of as many heads as now, from which the dense path sends no more than the factor path.

    The factor path's bytes grow with the nodes, those of the dense path hardly: so there is one such number.
    """

    def dense_is_cheaper(nodes: int) -> bool:
        # In one node nothing is sent, so the codec is known from two on.
        sent = replace(a, topology=replace(a.topology, nodes=nodes, rank=0, nodes_per_region=0)).path_bytes(layer)
        return sent["dense"] <= sent["factor"]

    return 2 + bisect_left(range(2, _MOST_NODES), True, key=dense_is_cheaper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a plan says of links of `link_gbit` Gbit/s, LTE first.

    Attributes:
        step_seconds: of a step without waiting, of all methods alike; None if it is not known.
        hiding_delay: the smallest delay with which LTE waits for no exchange; None without a step time.
        longest_delay: the largest one that the configuration has room for.
    """

    link_gbit: float
    payload_share: float
    step_seconds: float | None
    delay: int
    fragments: int
    hiding_delay: int | None
    longest_delay: int
    methods: list[Prediction]


def forecast(
    a: Arrangement,
    full_rank: FullRank,
    *,
    gbit: float,
    step_seconds: float | None = None,
) -> Forecast:
    """Predict LTE and full-rank training on links of `gbit` Gbit/s, DiLoCo with the same delay and fragments."""
    link, lte, delay, fragments = Link(gbit), lte_demand(a), a.cadence.delay, a.cadence.fragments
    return Forecast(
        link_gbit=gbit,
        payload_share=PAYLOAD_SHARE,
        step_seconds=step_seconds,
        delay=delay,
        fragments=fragments,
        hiding_delay=hiding_delay(lte, link, step_seconds=step_seconds, fragments=fragments) if step_seconds else None,
        longest_delay=longest_delay(a),
        methods=[
            predict(demand, link, step_seconds=step_seconds, delay=delay, fragments=fragments)
            for demand in (lte, *full_rank_demands(full_rank, a))
        ],
    )
