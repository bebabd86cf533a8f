"""What is to be known of a node from two scrapes of its endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lte_scale.top.scrape import Scrape

OWN_PHASES = ("data_wait", "forward", "backward", "optimizer")  # in the others a node may be waiting for another one


@dataclass(frozen=True, slots=True)
class Reading:
    """What a target has just said, and before, if it has; or the reason why it says nothing."""

    name: str
    now: Scrape | None = None
    before: Scrape | None = None
    reason: str = ""


class Node:
    """A node that answers. `grown` has the counters' growth since the scrape before; since its start, if no step ended
    in between or there is none before."""

    def __init__(self, name: str, now: Scrape, before: Scrape | None) -> None:
        self.now = now
        self.name = next((labels["node"] for labels in map(dict, now.series.get("lte_step", {}))), name)
        self.grown = now.since(before) if before else now
        if not self.grown.total("lte_steps_total"):
            self.grown = now
        self.phases = self.grown.by("phase", "lte_rank_phase_seconds_total")

    def share(self, *phases: str) -> float | None:
        """Of the ranks' time, what they spent in these phases."""
        return ratio(sum(self.phases.get(phase, 0.0) for phase in phases), sum(self.phases.values()))

    @property
    def step_seconds(self) -> float | None:
        return ratio(self.grown.total("lte_step_seconds_sum"), self.grown.total("lte_step_seconds_count"))

    @property
    def own_seconds(self) -> float | None:
        """Time of a rank for one step, without what it may be waiting for other nodes in."""
        ranks = len(self.now.by("local_rank", "lte_rank_phase_seconds_total"))
        own = sum(self.phases.get(phase, 0.0) for phase in OWN_PHASES)
        return ratio(own, ranks * self.grown.total("lte_steps_total"))

    @property
    def bytes_per_image(self) -> float | None:
        sent = self.grown.total("lte_network_bytes_total", scope="inter_node")
        return ratio(sent, self.grown.total("lte_images_total"))

    @property
    def bytes_per_second(self) -> float | None:
        """At the pace of images of the moment: what a merge sends comes in bursts."""
        per_image, pace = self.bytes_per_image, self.now.value("lte_images_per_second")
        return None if per_image is None or pace is None else per_image * pace

    @property
    def memory_peak(self) -> float | None:
        return max(self.now.values("lte_memory_bytes", kind="peak"), default=None)

    def age(self, metric: str) -> float | None:
        """Seconds since the earliest of these times."""
        times = [value for value in self.now.values(metric) if value > 0]
        return self.now.time - min(times) if times else None


def values(nodes: Sequence[Node], metric: str) -> list[float]:
    return [value for node in nodes for value in node.now.values(metric)]


def ratio(value: float, of: float) -> float | None:
    return value / of if of else None
