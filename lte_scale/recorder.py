"""From what a rank sees in every step to the records of the run: sums on the device, reduced when a record is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lte_scale.baselines import ddp_traffic
from lte_scale.collectives import Collectives
from lte_scale.config.schema import Config
from lte_scale.health import HeadHealth, Health
from lte_scale.log import progress
from lte_scale.merge import Merger
from lte_scale.metrics.accelerators import memory_bytes, peak_tflops
from lte_scale.metrics.board import Laps, Marks, open_board
from lte_scale.metrics.catalogue import PHASES
from lte_scale.metrics.record import JsonlWriter, Record, format_progress, format_summary
from lte_scale.metrics.writers import Writer, build_writers
from lte_scale.state import Schedule, TrainState
from lte_scale.timing import Stopwatch


class Interval:
    """Sums since the last record; tensors stay on the device, so that a step needs no host synchronisation for them.

    Attributes:
        heads: of every head of this process summed loss and gradient norm and the number of steps in which both were
            finite, and correct predictions [4, H].
    """

    def __init__(self, heads: int, device: torch.device) -> None:
        self.heads = torch.zeros(4, heads, device=device)
        self.clear()

    def clear(self) -> None:
        self.heads.zero_()
        self.steps = self.images = 0
        self.began = time.perf_counter()

    def add(self, losses: Tensor, correct: Tensor, norms: Tensor, images: int) -> None:
        """One step: loss, correct predictions and gradient norm of every head [H], images of this rank."""
        finite = losses.isfinite() & norms.isfinite()
        self.heads += torch.stack([losses.where(finite, 0.0), norms.where(finite, 0.0), finite, correct])
        self.steps += 1
        self.images += images


@dataclass(frozen=True, slots=True)
class Totals:
    """An interval over the ranks of a node.

    Attributes:
        heads: mean loss and gradient norm (of finite ones, or NaN) and top-1 ratio of every head of the node [3, h].
        means: the same [3] over the heads of the node, or of the run after a global merge, where finite.
        counts: steps skipped, samples and shards damaged so far, of the same heads.
        phases: seconds by phase, a mean over the ranks.
        memory_peak: bytes, the most of a rank.
    """

    heads: Tensor
    means: Tensor
    counts: Sequence[int]
    phases: Mapping[str, float]
    memory_peak: int


class Recorder:
    """Reduces what the ranks have seen to records and hands them to metrics.jsonl, the terminal and other writers
    (rank 0) and to the board for Prometheus (every rank).

    Between global merges a record holds the mean over node 0's heads, so that nothing crosses the network for it;
    after a global merge it holds the mean over all heads. Bytes are those that node 0 has sent.

    Attributes:
        clock: time by phase (`catalogue.PHASES`), a step being a lap.
    """

    def __init__(
        self,
        config: Config,
        collectives: Collectives,
        schedule: Schedule,
        merger: Merger,
        *,
        device: torch.device,
        flops_per_image: Callable[[], int],
    ) -> None:
        self.config, self.collectives, self.schedule, self.merger = config.metrics, collectives, schedule, merger
        self.device = device
        topology, run_dir = collectives.topology, Path(config.run_dir)
        self.clock: Stopwatch[str] = Stopwatch(device)
        self.interval = Interval(topology.heads_per_rank, device)
        self.health = HeadHealth(merger.heads, collectives)
        self.measured: Health | None = None
        self.writers: list[Writer] = []
        if topology.rank == 0:
            self.writers = [
                JsonlWriter(run_dir / "metrics.jsonl"),
                *build_writers(config.metrics, run_dir, run_dir.resolve().name, asdict(config)),
            ]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak_flops = 1e12 * (self.config.peak_tflops or peak_tflops(name) or 0.0)
        self.full_rank = ddp_traffic(merger.arrangement.shapes.values, topology.whole)["inter_node"]
        self.board = None
        if self.config.port:
            self.board = open_board(config, collectives, device, accelerator=name, peak_flops=self.peak_flops)
        # Counting takes a second or two: not where nothing shows it.
        self.flops_per_image = flops_per_image() if self.peak_flops or self.board else 0
        self.resumed_bytes: Mapping[str, int] = {}
        self.started = time.perf_counter()
        self.started_step = 0
        self.last: Record | None = None

    def resume(self, state: TrainState) -> None:
        """Continue the lines of an earlier part of the run."""
        self.resumed_bytes = dict(state.sent_bytes)
        self.started, self.started_step = time.perf_counter(), state.step
        for writer in self.writers:
            writer.rewind(state.step)
        if self.board is not None:
            self.board.started(state.step, self.schedule.total, state.restarts)
        self.interval.clear()

    def stepped(self, step: int) -> None:
        """After every step."""
        self.clock.lap()
        self.collectives.clock.lap()
        if self.board is not None:
            self.board.stepped(step)

    def skipped(self, head: int) -> None:
        """A head's step was skipped."""
        if self.board is not None:
            self.board.count("lte_skipped_steps_total", 1, str(head))

    def withdrawn(self, head: int) -> None:
        """A head was left out of a merge."""
        if self.board is not None:
            self.board.count("lte_withdrawn_heads_total", 1, str(head))

    def damaged(self, samples: int, shards: int) -> None:
        """So many damaged samples and shards were met."""
        if self.board is not None and samples:
            self.board.count("lte_bad_samples_total", samples)
            self.board.count("lte_bad_shards_total", shards)

    def checkpointed(self, step: int, seconds: float | None) -> None:
        """A save of `step` has ended after so many seconds, or failed (None)."""
        if self.board is not None:
            self.board.checkpointed(step, seconds)

    def measure(self) -> None:
        """Take the heads' health for the next record. Just before a merge; collective in the node."""
        self.measured = self.health.measure()

    def record(
        self, state: TrainState, lr: float, *, everywhere: bool, evaluation: Mapping[str, Any] | None = None
    ) -> Record:
        """Reduce the interval over the node, or over all nodes after a global merge, and write it. Collective."""
        topology, interval = self.collectives.topology, self.interval
        whole = topology.whole
        collectives = self.collectives.clock.drain()
        laps = self._laps(collectives)
        totals = self._reduce(state, laps, everywhere)
        loss, norm, top1 = totals.means.tolist()
        sent = self.collectives.node_bytes()
        self._update(state, totals, sent, everywhere)
        seconds = (time.perf_counter() - interval.began) / max(1, interval.steps)
        per_second = self.schedule.images_per_step / seconds
        record = Record(
            step=state.step,
            epoch=round(state.step / self.schedule.steps_per_epoch, 4),
            images=state.step * self.schedule.images_per_step,
            loss=loss,
            top1=top1,
            lr=lr,
            grad_norm=norm,
            images_per_second=per_second,
            step_seconds=seconds,
            data_wait_seconds=state.data_wait_seconds,
            merge_seconds=state.merge_seconds,
            inter_node_bytes=state.sent("inter_node"),
            intra_node_bytes=state.sent("intra_node"),
            mfu=self.flops_per_image * per_second / self.peak_flops / whole.world_size if self.peak_flops else None,
            heads=topology.heads_per_node * (topology.nodes if everywhere else 1),
            skipped_steps=state.skipped_steps,
            bad_samples=state.bad_samples,
            bad_shards=state.bad_shards,
            restarts=state.restarts,
            time=round(time.time(), 3),
            phase_seconds=dict(state.phase_seconds),
            sent_bytes=dict(state.sent_bytes),
            full_rank_bytes=round(self.full_rank * state.step),
            memory_peak_bytes=totals.memory_peak,
            head_loss=totals.heads[0].tolist(),
            head_grad_norm=totals.heads[1].tolist(),
            **(_health_fields(self.measured) if self.measured else {}),
            **(evaluation or {}),
        )
        left = self._seconds_left(state.step)
        if topology.rank == 0:
            progress.info(format_progress(record, self.schedule.total, left))
        for writer in self.writers:
            writer.write(record)
        merges = self.merger.clock.drain()
        if self.board is not None:
            self.board.timed(laps, merges, collectives)
            self.board.show(
                record,
                top1_by_head=totals.heads[2].tolist(),
                images=interval.images,
                steps=interval.steps,
                flops=self.flops_per_image * per_second / whole.nodes,
                full_rank_bytes=self.full_rank * interval.steps,
                seconds_left=left,
            )
        self.last, self.measured = record, None
        interval.clear()
        return record

    def _laps(self, collectives: Marks) -> Laps:
        """Seconds by phase of every step since the last record."""
        laps: dict[int, dict[str, float]] = {}
        for lap, phase, seconds in self.clock.drain():
            of_lap = laps.setdefault(lap, {})
            of_lap[phase] = of_lap.get(phase, 0.0) + seconds
        for lap, (_, purpose), seconds in collectives:
            if purpose == "head_gradient" and lap in laps:  # the optimizer averages gradients first
                laps[lap]["collectives"] = laps[lap].get("collectives", 0.0) + seconds
                laps[lap]["optimizer"] -= seconds
        return laps

    def _reduce(self, state: TrainState, laps: Laps, everywhere: bool) -> Totals:
        t, interval = self.collectives.topology, self.interval
        heads = torch.zeros(5, t.heads_per_node, dtype=torch.float64)
        first = t.my_heads.start - t.node * t.heads_per_node
        mine = heads[:, first : first + t.heads_per_rank]
        mine[:4] = interval.heads.double().cpu()
        mine[4] = interval.images / t.heads_per_rank
        counts = [state.skipped_here, state.bad_here, state.bad_shards_here]
        seconds = [sum(lap.get(phase, 0.0) for lap in laps.values()) / t.ranks_per_node for phase in PHASES]
        memory = [0] * t.ranks_per_node
        memory[t.local_rank] = memory_bytes(self.device)["peak"]
        own = torch.tensor([*counts, *seconds, *memory], dtype=torch.float64)
        flat = self.collectives.all_reduce(torch.cat([heads.flatten(), own]), self.collectives.node, "metrics")
        heads, counted, phases, peaks = flat.split([heads.numel(), len(counts), len(seconds), len(memory)])
        loss, norm, steps, correct, images = heads.view(5, -1)
        by_head = torch.stack([loss / steps, norm / steps, correct / images])
        finite = by_head.isfinite()
        sums = torch.cat([by_head.where(finite, 0.0).sum(1), finite.sum(1), counted])
        if everywhere:
            sums = self.collectives.all_reduce(sums, self.collectives.peers, "metrics")
        return Totals(
            heads=by_head,
            means=sums[:3] / sums[3:6],
            counts=[int(n) for n in sums[6:].tolist()],
            phases=dict(zip(PHASES, phases.tolist(), strict=True)),
            memory_peak=int(peaks.max().item()),
        )

    def _update(self, state: TrainState, totals: Totals, sent: Mapping[Any, int], everywhere: bool) -> None:
        """Advance the counters that resume."""
        for phase, seconds in totals.phases.items():
            state.phase_seconds[phase] = state.phase_seconds.get(phase, 0.0) + seconds
        for (scope, purpose), count in sent.items():
            key = f"{scope}/{purpose}"
            if count or key in self.resumed_bytes:
                state.sent_bytes[key] = self.resumed_bytes.get(key, 0) + count
        if everywhere:
            state.skipped_steps, state.bad_samples, state.bad_shards = totals.counts

    def _seconds_left(self, step: int) -> float:
        done = step - self.started_step
        return (self.schedule.total - step) * (time.perf_counter() - self.started) / max(1, done)

    def summarise(self, state: TrainState) -> None:
        """Show what the run came to, on the terminal of rank 0."""
        if self.last is not None and self.collectives.topology.rank == 0:
            for line in format_summary(self.last, state.best_top1, time.perf_counter() - self.started):
                progress.info(line)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        if self.board is not None:
            self.board.close()


def _health_fields(health: Health) -> dict[str, Any]:
    return {
        "head_delta_norm": health.delta_norms,
        "head_cosine_mean": health.cosine_mean,
        "head_cosine_max": health.cosine_max,
        "delta_effective_rank": health.effective_rank,
        "delta_rank_ratio": health.rank_ratio,
    }
