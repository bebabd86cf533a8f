"""What every rank tells Prometheus, and its first rank about the node."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from lte_scale.collectives import PURPOSES, SCOPES, Collectives
from lte_scale.config.schema import Config
from lte_scale.metrics.accelerators import memory_bytes, sensors
from lte_scale.metrics.catalogue import PHASES, STEP_PHASES
from lte_scale.metrics.endpoint import Endpoint, job_of, make_directory
from lte_scale.metrics.instruments import Instruments, versions
from lte_scale.metrics.record import Record

Marks = Sequence[tuple[int, tuple[str, str], float]]
"""(lap, labels, seconds), as a stopwatch drains them."""
Laps = Mapping[int, Mapping[str, float]]
"""Seconds by phase of every step."""


def open_board(
    config: Config, collectives: Collectives, device: torch.device, *, accelerator: str, peak_flops: float
) -> Board | None:
    """The board of this rank; None, said once per node, where the node has no room for its ranks' counts.

    Raises:
        ValueError: if the endpoint cannot listen.
    """
    t, store = collectives.topology, dist.distributed_c10d._get_default_store()
    key = f"lte/metrics/{t.node}"
    if t.local_rank == 0:
        store.set(key, str(make_directory() or ""))
    found = store.get(key).decode()
    if not found:
        return None
    return Board(config, collectives, device, Path(found), accelerator=accelerator, peak_flops=peak_flops)


class Board:
    """The instruments of this rank, and on the node's first rank its endpoint."""

    def __init__(
        self,
        config: Config,
        collectives: Collectives,
        device: torch.device,
        directory: Path,
        *,
        accelerator: str,
        peak_flops: float,
    ) -> None:
        t = collectives.topology
        self.config, self.collectives, self.topology, self.device = config, collectives, t, device
        self.first, self.rank = t.local_rank == 0, str(t.local_rank)
        self._counted: dict[tuple[str, str], int] = {}
        instruments = Instruments(directory, node=t.node, local_rank=t.local_rank)
        self.count, self.set, self.observe = instruments.count, instruments.set, instruments.observe
        self.endpoint: Endpoint | None = None
        if self.first:
            self.endpoint = Endpoint(config.metrics, directory, node=t.node, run_dir=Path(config.run_dir))
            self._describe(accelerator, peak_flops)

    def _describe(self, accelerator: str, peak_flops: float) -> None:
        config, t = self.config, self.topology
        self.set("lte_build_info", 1, *versions(accelerator))
        described = (config.model.name, config.engine.name, config.base.scope, config.adapters.rank, config.merge.every)
        self.set("lte_config_info", 1, job_of(config.metrics, Path(config.run_dir)), *map(str, described), str(t.heads))
        self.set("lte_start_timestamp_seconds", time.time())
        self.set("lte_accelerators", t.ranks_per_node)
        self.set("lte_accelerator_peak_flops_per_second", peak_flops or None)
        self.count("lte_steps_total", 0)
        self.count("lte_windows_total", 0)
        self.count("lte_full_rank_bytes_total", 0)
        scopes = [scope for scope, ranks in zip(SCOPES, (t.nodes, t.ranks_per_node), strict=True) if ranks > 1]
        for scope, purpose in product(scopes, PURPOSES):
            self.count("lte_network_bytes_total", 0, scope, purpose)
        for result in ("written", "failed"):
            self.count("lte_checkpoints_total", 0, result)

    def started(self, step: int, total: int, restarts: int) -> None:
        """Before the first step."""
        for head in self.topology.my_heads if self.topology.head_member == 0 else ():
            self.count("lte_skipped_steps_total", 0, str(head))
            self.count("lte_withdrawn_heads_total", 0, str(head))
        self.set("lte_rank_step", step, self.rank)
        self.set("lte_rank_step_timestamp_seconds", time.time(), self.rank)
        if self.first:
            self.set("lte_step", step)
            self.set("lte_planned_steps", total)
            self.set("lte_restarts", restarts)

    def stepped(self, step: int) -> None:
        """After every step."""
        self.set("lte_rank_step", step, self.rank)
        self.set("lte_rank_step_timestamp_seconds", time.time(), self.rank)

    def checkpointed(self, step: int, seconds: float | None) -> None:
        """A save has ended; None if it failed."""
        if self.first:
            self.count("lte_checkpoints_total", 1, "failed" if seconds is None else "written")
            if seconds is not None:
                self.set("lte_checkpoint_step", step)
                self.set("lte_checkpoint_seconds", seconds)
                self.set("lte_checkpoint_timestamp_seconds", time.time())

    def timed(self, laps: Laps, merges: Marks, collectives: Marks) -> None:
        """What the stopwatches have measured since the last record."""
        for lap in laps.values():
            for phase in PHASES:
                if seconds := lap.get(phase):
                    self.count("lte_rank_phase_seconds_total", seconds, self.rank, phase)
                    if phase in STEP_PHASES:
                        self.observe("lte_step_phase_seconds", seconds, phase)
            if self.first and "forward" in lap:
                self.observe("lte_step_seconds", sum(lap.get(phase, 0.0) for phase in (*STEP_PHASES, "merge")))
        by_merge: dict[tuple[int, tuple[str, str]], float] = {}
        for number, labels, seconds in merges:
            by_merge[number, labels] = by_merge.get((number, labels), 0.0) + seconds
        for (_, labels), seconds in by_merge.items():
            self.observe("lte_merge_seconds", seconds, *labels)
        if self.first:
            self.count("lte_windows_total", len({number for number, (scope, _) in by_merge if scope == "global"}))
        for _, labels, seconds in collectives:
            self.observe("lte_collective_seconds", seconds, *labels)

    def show(
        self,
        record: Record,
        *,
        top1_by_head: Sequence[float],
        images: int,
        steps: int,
        flops: float,
        full_rank_bytes: float,
        seconds_left: float,
    ) -> None:
        """A record; `images` are those of this rank, `flops` (per second) and `full_rank_bytes` those of the node."""
        self.count("lte_images_total", images)
        for key, sent in self.collectives.bytes_sent.items():
            self.count("lte_network_bytes_total", sent - self._counted.get(key, 0), *key)
            self._counted[key] = sent
        for kind, size in memory_bytes(self.device).items():
            self.set("lte_memory_bytes", size, self.rank, kind)
        for sensor, value in sensors(self.device).items():
            self.set(f"lte_accelerator_{sensor}", value, self.rank)
        if not self.first:
            return
        t = self.topology
        self.count("lte_steps_total", steps)
        self.count("lte_full_rank_bytes_total", full_rank_bytes)
        self.set("lte_step", record.step)
        self.set("lte_remaining_seconds", seconds_left)
        self.set("lte_images_per_second", record.images_per_second / t.nodes)
        self.set("lte_accelerator_images_per_second", record.images_per_second / t.world_size)
        self.set("lte_model_flops_per_second", flops)
        self.set("lte_mfu_ratio", record.mfu)
        self.set("lte_learning_rate", record.lr)
        self.set("lte_eval_top1_ratio", record.eval_top1)
        self.set("lte_eval_top5_ratio", record.eval_top5)
        self.set("lte_eval_loss", record.eval_loss)
        self.set("lte_head_cosine_mean", record.head_cosine_mean)
        self.set("lte_head_cosine_max", record.head_cosine_max)
        self.set("lte_merged_delta_effective_rank", record.delta_effective_rank)
        self.set("lte_merged_delta_rank_ratio", record.delta_rank_ratio)
        by_head = {
            "lte_loss": record.head_loss,
            "lte_top1_ratio": top1_by_head,
            "lte_gradient_norm": record.head_grad_norm,
            "lte_head_delta_norm": record.head_delta_norm or (),
        }
        for name, values in by_head.items():
            for index, value in enumerate(values):
                self.set(name, value, str(t.node * t.heads_per_node + index))

    def close(self) -> None:
        """Stop serving; the ranks' files are deleted."""
        if self.endpoint is not None:
            self.endpoint.close()
