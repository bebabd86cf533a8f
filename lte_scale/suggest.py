"""`lte-scale plan --suggest`: merge options with which steps hardly wait for the link, at the least loss.

What is given up, in this order: nothing; the heads' merges being known at once (`delay`, `fragments`); the precision of
what crosses between nodes, a step at a time; merges as often as configured. How often is the last to go: a longer
window costs accuracy (docs/recipes.md), few bits cost hardly any (`merge` keeps what a message misses).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lte_scale.arrangement import Arrangement
from lte_scale.config import overridden
from lte_scale.config.schema import Config, ConfigError, MergeConfig
from lte_scale.estimate import Traces
from lte_scale.link import Demand, Link, longest_delay, lte_demand, predict
from lte_scale.quantities import seconds, share, size

BOUND = 0.01
"""Waiting that is let be, as a share of the time of a step."""

SOON = 0.1
"""Of a window: a delay no longer than this is taken as it is, for a longer one the exchange is cut into fragments."""

LONGEST = 8
"""Windows as long as this many of the configured ones are tried, and no longer ones."""

PRECISIONS: tuple[str, ...] = next(f.metadata["one_of"] for f in fields(MergeConfig) if f.name == "precision")
"""From the most bits to the fewest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Overrides that bring the waiting under `bound`, and what they change.

    Attributes:
        enough: whether there are any that do; else `overrides` are those with which it is least.
        overrides: none if the configuration needs none.
        reasons: one for each override, or why they are not enough.
        stall_share: waiting as a share of step time with them, `stall_share_now` without.
    """

    bound: float
    enough: bool
    overrides: tuple[str, ...]
    reasons: tuple[str, ...]
    stall_share_now: float
    stall_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to merge. `waits`: as a share of step time."""

    every: int
    precision: str
    fragments: int
    delay: int
    demand: Demand
    waits: float

    def changes(self, config: Config) -> list[str]:
        """The keys of `merge` that are configured otherwise."""
        names = ("precision", "fragments", "delay", "every")
        return [name for name in names if getattr(self, name) != getattr(config.merge, name)]

    def overrides(self, config: Config) -> tuple[str, ...]:
        """As they are written on the command line."""
        return tuple(f"merge.{name}={getattr(self, name)}" for name in self.changes(config))


def suggest(
    config: Config,
    traces: Traces,
    *,
    nodes: int,
    ranks_per_node: int,
    gbit: float,
    step_seconds: float,
    longest: int = LONGEST,
) -> Suggestion:
    """The least that brings the waiting of `config` under `BOUND`, on links of `gbit` Gbit/s and with such steps.

    Args:
        traces: of a variant of `config`.
        longest: window, in configured ones.
    """
    search = _Search(config, traces, nodes, ranks_per_node, Link(gbit), step_seconds, longest)
    now = search.option(config)
    rejected: list[Option] = []
    enough = now if now.waits < BOUND else search.least(now, rejected)
    found = enough or min([now, *rejected], key=lambda option: option.waits)
    return Suggestion(
        bound=BOUND,
        enough=enough is not None,
        overrides=found.overrides(config),
        reasons=tuple(search.reasons(enough, rejected) if enough else [search.why_none(now, rejected)]),
        stall_share_now=now.waits,
        stall_share=found.waits,
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """Options for one configuration on one link."""

    config: Config
    traces: Traces
    nodes: int
    ranks_per_node: int
    link: Link
    step_seconds: float
    longest: int

    def option(self, config: Config) -> Option:
        """How much steps wait as `config` says."""
        return self._option(config, lte_demand(self._arrangement(config)), config.merge.delay)

    def least(self, now: Option, rejected: list[Option]) -> Option | None:
        """The first option in order of loss that is enough; the best of each precision before it go to `rejected`."""
        merge = self.config.merge
        if self._of_steps(now) - 1 >= BOUND:
            return None
        for times in range(1, self.longest + 1):
            for precision in PRECISIONS[PRECISIONS.index(merge.precision) :]:
                tried = list(self._options(merge.every * times, precision))
                enough = [option for option in tried if option.waits < BOUND]
                if enough:
                    return min(enough, key=_staleness)
                rejected += [min(tried, key=lambda option: option.waits)] if tried else []
        return None

    def _options(self, every: int, precision: str) -> Iterator[Option]:
        """For every number of fragments the smallest delay that is enough, or the longest one."""
        for fragments in (n for n in range(1, every + 1) if every % n == 0):
            settings = (f"merge.every={every}", f"merge.precision={precision}", f"merge.fragments={fragments}")
            config = self._allowed(*settings, "merge.delay=0")
            if config is None:
                continue
            a = self._arrangement(config)
            demand = lte_demand(a)
            longest = longest_delay(a) if self._allowed(*settings, "merge.delay=1") else 0
            delays = (self._option(config, demand, delay) for delay in range(longest + 1))
            found = next(option for option in delays if option.waits < BOUND or option.delay == longest)
            yield found
            soon = found.waits < BOUND and found.delay <= SOON * every
            hopeless = self._steps(demand.exchange_bytes) > (1 + BOUND) * every
            if soon or hopeless or fragments >= len(a.shapes.layers):
                return

    def _allowed(self, *overrides: str) -> Config | None:
        try:
            return overridden(self.config, overrides)
        except ConfigError:
            return None

    def _arrangement(self, config: Config) -> Arrangement:
        return self.traces.arrangement(config, nodes=self.nodes, ranks_per_node=self.ranks_per_node)

    def _option(self, config: Config, demand: Demand, delay: int) -> Option:
        merge = config.merge
        found = predict(demand, self.link, step_seconds=self.step_seconds, delay=delay, fragments=merge.fragments)
        assert found.stall_share is not None
        return Option(
            every=merge.every,
            precision=merge.precision,
            fragments=merge.fragments,
            delay=delay,
            demand=demand,
            waits=found.stall_share,
        )

    def _steps(self, sent: float) -> float:
        """How many steps' time so many bytes take."""
        return self.link.seconds(sent) / self.step_seconds

    def _of_steps(self, option: Option) -> float:
        return self._steps(option.demand.step_bytes)

    def reasons(self, found: Option, rejected: list[Option]) -> Iterator[str]:
        """Why each of the overrides, in their order."""
        largest = max(found.demand.exchanges(found.fragments))
        at_once = self._steps(found.demand.exchange_bytes)
        shorter = [option for option in rejected if option.every < found.every]
        of_window = [option for option in rejected if option.every == found.every]
        for name in found.changes(self.config):
            if name == "precision":
                yield self._short(of_window[-1])
            elif name == "fragments":
                yield (
                    f"at once it would take {at_once:.3g} of {found.every} steps" if found.fragments > 1 else "fewer do"
                )
            elif name == "delay":
                yield f"an exchange takes up to {seconds(self.link.seconds(largest))}, {self._steps(largest):.3g} steps"
            else:
                yield self._short(shorter[-1])

    def why_none(self, now: Option, rejected: list[Option]) -> str:
        if rejected:
            return f"{self._short(rejected[-1])}, and no longer window is tried"
        all_of_one = self.config.optimizer.average == "all"
        remedy = "method=lte" if all_of_one else "base.gather=node or base.scope=node"
        return (
            f"what every step sends takes {self._of_steps(now):.3g} times as long as the step, and no merge changes "
            f"that; use {remedy}"
        )

    def _short(self, option: Option) -> str:
        """Why an option is not enough."""
        steps, where = self._steps(option.demand.exchange_bytes), f"in {option.precision}"
        if steps > option.every:
            return f"{where} a window's exchanges take {steps:.3g} steps, and it has {option.every}"
        return f"{where}, {option.every} steps to a window, {share(option.waits)} of step time is waiting at best"


def _staleness(option: Option) -> tuple[float, int, int]:
    return max(0.0, option.delay - SOON * option.every), option.fragments, option.delay


def suggestion_lines(found: Suggestion, *, memory_now: int, memory: int) -> Iterator[str]:
    """As text; the overrides are a line of their own. `memory`: bytes of a rank with them, `memory_now` without."""
    yield ""
    if found.enough and not found.overrides:
        yield f"Steps wait {share(found.stall_share)} of their time: no other merge options are needed"
        return
    if not found.enough:
        yield f"No merge options bring the waiting under {found.bound:.0%} of step time: {found.reasons[0]}"
    if found.overrides:
        yield f"Steps wait {share(found.stall_share_now)} of their time, and {share(found.stall_share)} with"
        yield f"  {' '.join(found.overrides)}"
        if found.enough:
            for override, reason in zip(found.overrides, found.reasons, strict=True):
                yield f"    {override:<24}{reason}"
        yield f"  memory per rank {size(memory)}, now {size(memory_now)}"
