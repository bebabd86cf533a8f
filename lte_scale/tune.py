"""`merge.tune`: the merge options that a run's own link and steps ask for, found before its first step."""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lte_scale.arrangement import Arrangement
from lte_scale.assemble import assemble
from lte_scale.bandwidth import Bandwidth, slowest
from lte_scale.collectives import Collectives
from lte_scale.config import load_config, overridden
from lte_scale.config.schema import Config
from lte_scale.estimate import Traces
from lte_scale.link import Link, gigabits, lte_demand, predict
from lte_scale.log import log
from lte_scale.precision import with_precision
from lte_scale.quantities import rate, seconds, share
from lte_scale.run_dir import candidates
from lte_scale.suggest import suggest

TUNED = ("precision", "fragments", "delay")
"""The keys of `merge` that are chosen: windows stay as long as configured."""

_WARM, _MEASURED = 2, 5
_SMALLEST_MESSAGE, _LARGEST_MESSAGE = 4 << 10, 64 << 20


def tuned(config: Config, collectives: Collectives, device: torch.device) -> Config:
    """`config` with `TUNED` as `plan --suggest` finds them, by measurement; a run that goes on keeps what it has.

    Collective.

    Raises:
        ValueError: if the run cannot be built.
    """
    t = collectives.topology
    if not config.merge.tune:
        return config
    begun_with = collectives.broadcast_object(_begun_with(config) if t.rank == 0 else None)
    if begun_with is not None:
        return overridden(config, begun_with)
    if t.nodes == 1:
        log.info("merge.tune: with one node nothing crosses between nodes")
        return config
    config = with_precision(config, device)
    traces = Traces(config)
    aside = collectives.aside()  # what is tried is no part of the run's counts
    step = _step_seconds(config, traces.classes, aside, device)
    a = traces.arrangement(config, nodes=t.nodes, ranks_per_node=t.ranks_per_node)
    gbit = _link_gbit(a, aside, device, gather=True)
    own_gbit = _link_gbit(a, aside, device, gather=False) if _reduces(a) else gbit
    dist.destroy_process_group(aside.peers.process_group)
    chosen = _chosen(config, traces, a, gbit=gbit, own_gbit=own_gbit, step=step) if t.rank == 0 else ()
    return overridden(config, collectives.broadcast_object(chosen))


def _step_seconds(config: Config, num_classes: int, collectives: Collectives, device: torch.device) -> float:
    """Of a step that waits for no data and no merge, of the slowest rank; on a model that is let go. Collective."""
    lte = assemble(config, num_classes, collectives, device)
    heads, model = len(lte.heads.ids), config.model
    rows = config.train.batch_size * heads // collectives.topology.ranks_per_head
    images = torch.randn(rows, model.channels, model.image_size, model.image_size, device=device)
    targets = torch.randint(num_classes, (rows,), device=device)
    taken = []
    for _ in range(_WARM + _MEASURED):
        began = time.perf_counter()
        for _ in range(config.train.accumulate):
            with lte.autocast:
                logits = lte.model(images).float()
            losses = F.cross_entropy(logits, targets, reduction="none").view(heads, -1).mean(1)
            losses.sum().backward()
        lte.optimizer.step(losses.detach(), lambda peak: 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    lte.merger.close()
    del lte, logits, losses
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return slowest(statistics.median(taken[_WARM:]), collectives, device)


def _reduces(a: Arrangement) -> bool:
    """Whether the merges, as they are configured, are all-reduces; all others gather, which gloo does slower."""
    return a.codec.exact and not a.spread and set(a.paths.values()) == {"dense"}


def _link_gbit(a: Arrangement, collectives: Collectives, device: torch.device, *, gather: bool) -> float:
    """What leaves the slowest node in an exchange as large as the run's, in Gbit/s with headers. Collective."""
    t = collectives.topology
    part = int(max(lte_demand(a).exchanges(1))) // t.ranks_per_node // (t.nodes - 1)
    largest = min(max(part, _SMALLEST_MESSAGE), _LARGEST_MESSAGE)
    rank_s = Bandwidth(collectives, device, largest, gather=gather).of(collectives.peers)
    return gigabits(rank_s * t.ranks_per_node)


def _begun_with(config: Config) -> tuple[str, ...] | None:
    """As overrides, what the run that goes on was tuned to; None if there is none."""
    try:
        found = candidates(Path(config.run_dir), config.resume)
    except ValueError:  # what the trainer will refuse, in words of its own
        return ()
    for checkpoint in found:
        try:
            merge = load_config(checkpoint / "config.yaml").merge
        except ValueError:  # torn: so it will go on from the one before
            continue
        return tuple(f"merge.{name}={getattr(merge, name)}" for name in TUNED) if merge.tune else None
    return None


def _chosen(
    config: Config, traces: Traces, a: Arrangement, *, gbit: float, own_gbit: float, step: float
) -> tuple[str, ...]:
    """Options by the rate of gathering, as all but fp32 on the dense path do; the waiting as it is, by its own rate."""
    t = a.topology
    found = suggest(
        config, traces, nodes=t.nodes, ranks_per_node=t.ranks_per_node, gbit=gbit, step_seconds=step, longest=1
    )
    log.info("merge.tune: steps of %s, %s between nodes", seconds(step), rate(gbit))
    if not found.enough:
        log.warning("merge.tune: no merge options hide the exchange: %s", found.reasons[0])
    if found.overrides:
        delay, fragments = a.cadence.delay, a.cadence.fragments
        now = predict(lte_demand(a), Link(own_gbit), step_seconds=step, delay=delay, fragments=fragments)
        shares = share(now.stall_share), share(found.stall_share)
        log.info("merge.tune: steps would wait %s of their time, and %s with %s", *shares, " ".join(found.overrides))
    else:
        log.info("merge.tune: steps will wait %s of their time, and nothing is changed", share(found.stall_share))
    return found.overrides
