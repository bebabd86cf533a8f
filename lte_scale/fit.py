"""`lte-scale plan --fit`: the batch and the GPUs with which a configuration fits, and what helps where it does not.

All by the prediction of `estimate`: a found batch fits and the next larger one does not, by that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations

from lte_scale.arrangement import Arrangement
from lte_scale.config import check_topology, overridden
from lte_scale.config.schema import Config, ConfigError
from lte_scale.estimate import Traces
from lte_scale.memory import Memory, memory
from lte_scale.quantities import size

GB = 1e9
MARGIN = 0.1
"""Share of the memory that is left to what no formula counts: the allocator's slack, the CUDA context, NCCL's buffers,
kernels' workspaces. A custom, not a measurement."""

_MOST_IMAGES = 1 << 20
_MOST_RANKS = 16
_MOST_NODES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to ask for, and what a rank then holds at most.

    Attributes:
        options: as they are written on the command line; empty for the configuration as it is.
        heads: in the whole run.
        peak: bytes, all parts together; 0 where the choice is refused.
        memory: None where the choice is refused.
        refused: why it is.
    """

    options: tuple[str, ...] = ()
    heads: int = 0
    peak: int = 0
    memory: Memory | None = None
    fits: bool = False
    refused: str = ""

    @property
    def largest(self) -> tuple[str, int]:
        """The largest part on the accelerator, and its bytes."""
        parts = asdict(self.memory) if self.memory else {}
        parts.pop("cpu", None)
        return max(parts.items(), key=lambda item: item[1], default=("", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What fits into `limit` bytes: `gigabytes` less `margin`. None is what does not, whatever is tried.

    Attributes:
        batch: the largest `train.batch_size`.
        next_batch: the next one, which does not fit.
        ranks, nodes: the fewest ranks per node, and nodes, all else as configured.
        switches: what would lower the peak with the same heads, images per step and merges; empty if nothing must.
        together: the fewest of them that fit together, where none does alone; all of them if none do.
    """

    gigabytes: float
    margin: float
    limit: float
    configured: Choice
    batch: Choice | None
    next_batch: Choice | None
    ranks: Choice | None
    nodes: Choice | None
    switches: list[Choice]
    together: Choice | None


def fit(config: Config, traces: Traces, *, nodes: int, ranks_per_node: int, gigabytes: float, margin: float) -> Fit:
    """What of `config` fits into accelerators of so many GB (10^9 bytes), a share `margin` of which is left alone.

    Args:
        traces: of a variant of `config`.
        gigabytes: above 0.
        margin: from 0 on and below 1.
    """
    search = _Search(config, traces, nodes, ranks_per_node, limit=gigabytes * GB * (1 - margin))
    configured = search.choice(config)
    images = search.largest_batch()
    batch, next_batch = (search.batch(n) if n else None for n in (images, images + search.unit))
    switches = [] if configured.fits else search.switches(images)
    return Fit(
        gigabytes=gigabytes,
        margin=margin,
        limit=search.limit,
        configured=configured,
        batch=batch,
        next_batch=next_batch,
        ranks=search.fewest_ranks(),
        nodes=search.fewest_nodes(),
        switches=switches,
        together=search.together(switches),
    )


class _Search:
    def __init__(self, config: Config, traces: Traces, nodes: int, ranks_per_node: int, *, limit: float) -> None:
        self.config, self.traces, self.limit = config, traces, limit
        self.nodes, self.ranks_per_node = nodes, ranks_per_node
        topology = traces.arrangement(config, nodes=nodes, ranks_per_node=ranks_per_node).topology
        paired = config.augment.mixup or config.augment.cutmix
        self.unit = topology.ranks_per_head * (2 if paired else 1)
        """Images that `train.batch_size` is a multiple of: of ranks that share a head, in pairs for mixup."""

    def choice(self, config: Config, options: tuple[str, ...] = (), *, nodes: int = 0, ranks: int = 0) -> Choice:
        a = self._arrangement(config, nodes or self.nodes, ranks or self.ranks_per_node)
        spent = self.traces.memory(a)
        return Choice(
            options=options, heads=a.topology.heads, peak=spent.total, memory=spent, fits=spent.total <= self.limit
        )

    def _arrangement(self, config: Config, nodes: int, ranks: int) -> Arrangement:
        return self.traces.arrangement(config, nodes=nodes, ranks_per_node=ranks)

    def batch(self, images: int, accumulate: int = 0) -> Choice:
        options = (f"train.batch_size={images}", *([f"train.accumulate={accumulate}"] if accumulate else []))
        return self.choice(overridden(self.config, options), options)

    def largest_batch(self) -> int:
        """0 if none fits."""
        a = self._arrangement(self.config, self.nodes, self.ranks_per_node)

        def peak(units: int) -> int:
            if not units:
                return memory(a, activations=0).total
            train = replace(self.config.train, batch_size=units * self.unit)
            return self.traces.memory(replace(a, config=replace(self.config, train=train))).total

        found = largest(peak, self.limit, most=_MOST_IMAGES, guess=max(1, self.config.train.batch_size // self.unit))
        return found * self.unit

    def fewest_ranks(self) -> Choice | None:
        heads = self.config.topology.heads_per_node
        divisors = {n for n in range(1, _MOST_RANKS + 1) if heads and heads % n == 0}
        counts = {*_doubling(_MOST_RANKS), *divisors, self.ranks_per_node}
        return self._first(("--ranks-per-node", n, self.nodes, n) for n in sorted(counts))

    def fewest_nodes(self) -> Choice | None:
        counts = {*_doubling(_MOST_NODES), self.nodes}
        return self._first(("--nodes", n, n, self.ranks_per_node) for n in sorted(counts))

    def _first(self, tried: Iterable[tuple[str, int, int, int]]) -> Choice | None:
        for option, count, nodes, ranks in tried:
            try:
                check_topology(self.config, nodes, ranks)
            except ValueError:
                continue
            if memory(self._arrangement(self.config, nodes, ranks), activations=0).total > self.limit:
                continue  # known without a trace
            found = self.choice(self.config, (f"{option} {count}",), nodes=nodes, ranks=ranks)
            if found.fits:
                return found
        return None

    def switches(self, images: int) -> list[Choice]:
        """What would lower the peak, the most first; `images`: the largest batch that fits."""
        return sorted(self._helpful(images), key=lambda switch: (bool(switch.refused), switch.peak))

    def _helpful(self, images: int) -> Iterator[Choice]:
        now = self.choice(self.config)
        tried = [
            ("train.precision=bf16",),
            ("base.gather=pass",),
            ("train.checkpoint_activations=true",),
            ("base.offload=cpu",),
            ("base.precision=nf4",),
            ("base.scope=global", "base.gather=pass"),
        ]
        for options in tried:
            found = self._switched(options)
            if found and (found.refused or found.peak < now.peak):
                yield found
        smaller = self._divided(images or self.unit)
        if smaller:
            yield smaller

    def _switched(self, options: tuple[str, ...]) -> Choice | None:
        """None if the configuration is so already."""
        try:
            config = overridden(self.config, options)
            check_topology(config, self.nodes, self.ranks_per_node)
        except ConfigError as error:
            return Choice(options=options, refused=str(error))
        return None if config == self.config else self.choice(config, options)

    def _divided(self, images: int) -> Choice | None:
        """As many images per step in more micro-steps of at most `images`."""
        train = self.config.train
        parts = [n for n in range(2, train.batch_size // self.unit + 1) if train.batch_size % (n * self.unit) == 0]
        enough = [n for n in parts if train.batch_size // n <= images] or parts[-1:]
        return self.batch(train.batch_size // enough[0], train.accumulate * enough[0]) if enough else None

    def together(self, switches: list[Choice]) -> Choice | None:
        usable = [switch for switch in switches if not switch.refused]
        if len(usable) < 2 or any(switch.fits for switch in usable):
            return None
        found = None
        for count in range(2, len(usable) + 1):
            for some in combinations(usable, count):
                found = self._switched(tuple(dict.fromkeys(option for switch in some for option in switch.options)))
                if found and found.fits:
                    return found
        return found


def largest(peak: Callable[[int], int], limit: float, *, most: int, guess: int) -> int:
    """The largest n from 1 to `most` with `peak(n) <= limit` and `peak(n + 1) > limit` (or n = `most`); 0 if none.

    A peak takes seconds to find, and grows almost along a line. So the next n is where the line through the nearest
    points on either side meets the limit; from the sixth on, every other one is the middle, which bounds their number.
    """
    seen = {0: peak(0)}
    low, high, n = 0, most + 1, guess
    if seen[0] > limit:
        return 0
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        seen[n] = peak(n)
        low, high = (n, high) if seen[n] <= limit else (low, n)
        left, right = (low, high) if high in seen else sorted(seen)[-2:]
        slope = (seen[right] - seen[left]) / (right - left)
        n = left + int((limit - seen[left]) / slope) if slope > 0 else high
        if len(seen) > 6 and len(seen) % 2:
            n = (low + high) // 2
    return low


def _doubling(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2


def fit_lines(found: Fit) -> Iterator[str]:
    """As text."""
    yield ""
    yield (
        f"Within {found.gigabytes:g} GB (10^9 bytes) per accelerator, {found.margin:.0%} of it left alone: "
        f"{size(found.limit)}"
    )
    yield f"  {'':<22}{'':<42}{'peak':>11}{'heads':>8}  largest part"
    yield _row("as configured", found.configured)
    yield _row("largest batch", found.batch)
    if found.batch and found.next_batch:
        yield _row("  one larger", found.next_batch)
    yield _row("fewest GPUs per node", found.ranks, f"none up to {_MOST_RANKS}")
    yield _row("fewest nodes", found.nodes, f"none up to {_MOST_NODES:,}")
    if found.configured.fits:
        return
    yield "What would help, with the same heads, images per step and merges"
    for switch in found.switches:
        yield _row("", switch)
    if found.together:
        yield _row("together", found.together)
    if not any(choice and choice.fits for choice in (*found.switches, found.together)):
        part, held = (found.together or found.configured).largest
        yield f"  which is not enough; the largest part then is {part.replace('_', ' ')}, {size(held)}"


def _row(title: str, choice: Choice | None, otherwise: str = "none") -> str:
    if choice is None:
        return f"  {title:<22}{otherwise}"
    options = f"{' '.join(choice.options):<42}"
    if not choice.memory:
        return f"  {title:<22}{options}\n      refused: {choice.refused.partition(';')[0]}"
    if len(options) > 42:
        options += f"\n{'':<66}"
    part, held = choice.largest
    row = f"  {title:<22}{options}{size(choice.peak):>11}{choice.heads:>8}  {part.replace('_', ' ')} {size(held)}"
    return row if choice.fits else f"{row}, too much"
