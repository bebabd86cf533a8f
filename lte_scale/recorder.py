"""From what a rank sees in every step to the records of the run: sums on the device, reduced when a record is due."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from lte_scale.collectives import SCOPES, Collectives
from lte_scale.config.schema import MetricsConfig
from lte_scale.log import progress
from lte_scale.metrics import Endpoint, JsonlWriter, Record, format_progress, peak_tflops
from lte_scale.state import Schedule, TrainState


class Interval:
    """Sums since the last record; tensors stay on the device, so that a step needs no host synchronisation for them."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.heads = heads
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), device=device)
        self.gradient_norm = torch.zeros((), device=device)
        self.clear()

    def clear(self) -> None:
        for tensor in (self.loss, self.correct, self.gradient_norm):
            tensor.zero_()
        self.steps = self.images = 0
        self.began = time.perf_counter()

    def add(self, losses: Tensor, correct: Tensor, norms: Tensor, images: int) -> None:
        """One step: loss and gradient norm of every head [H], correct predictions, images of this rank."""
        self.loss += losses.nan_to_num(0.0, 0.0, 0.0).mean()
        self.correct += correct
        self.gradient_norm += norms.nan_to_num(0.0, 0.0, 0.0).mean()
        self.steps += 1
        self.images += images


class Recorder:
    """Writes metrics.jsonl (rank 0), shows progress (rank 0), serves each node's Prometheus endpoint (local rank 0).

    Between global merges a record holds the mean over node 0's heads, so that nothing crosses the network for it;
    after a global merge it holds the mean over all heads. Bytes are those that node 0 has sent.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        collectives: Collectives,
        schedule: Schedule,
        *,
        heads: int,
        device: torch.device,
        flops_per_image: int,
    ) -> None:
        self.config, self.collectives, self.schedule = config, collectives, schedule
        self.device, self.flops_per_image = device, flops_per_image
        topology = collectives.topology
        self.interval = Interval(heads, device)
        self.writer = JsonlWriter(run_dir / "metrics.jsonl") if topology.rank == 0 else None
        self.endpoint = None
        if topology.local_rank == 0 and config.port:
            self.endpoint = Endpoint(config.address, config.port, node=topology.node, run_dir=run_dir)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak_flops = 1e12 * (config.peak_tflops or peak_tflops(name) or 0.0)
        self.resumed_bytes = (0, 0)
        self.started = time.perf_counter()
        self.started_step = 0

    def resume(self, state: TrainState) -> None:
        """Continue the lines and counters of an earlier part of the run."""
        self.resumed_bytes = (state.inter_node_bytes, state.intra_node_bytes)
        self.started, self.started_step = time.perf_counter(), state.step
        if self.writer is not None:
            self.writer.rewind(state.step)
        if self.endpoint is not None:
            self.endpoint.resume(**self._counters(state))
        self.interval.clear()

    def _counters(self, state: TrainState) -> dict[str, float]:
        return {
            "step": state.step,
            "images": state.step * self.schedule.images_per_step,
            "data_wait_seconds": state.data_wait_seconds,
            "skipped_steps": state.skipped_steps,
            "bad_samples": state.bad_samples,
        }

    def merged(self, everywhere: bool, seconds: float) -> None:
        """Count a merge on the node's endpoint."""
        if self.endpoint is not None:
            self.endpoint.merged("global" if everywhere else "local", seconds)

    def record(
        self, state: TrainState, lr: float, *, everywhere: bool, evaluation: dict[str, float] | None = None
    ) -> Record:
        """Reduce the interval over the node, or over all nodes after a global merge, and write it. Collective."""
        interval, topology = self.interval, self.collectives.topology
        group = self.collectives.world if everywhere else self.collectives.node
        sums = torch.stack([interval.loss, interval.correct, interval.gradient_norm]).double()
        extra = torch.tensor([interval.images, state.skipped_here, state.bad_here], device=self.device)
        total = self.collectives.all_reduce(torch.cat([sums, extra.double()]), group, "metrics").tolist()
        sent = self.collectives.node_bytes()
        state.inter_node_bytes, state.intra_node_bytes = (
            before + sum(count for (of, _), count in sent.items() if of == scope)
            for before, scope in zip(self.resumed_bytes, SCOPES, strict=True)
        )
        if everywhere:
            state.skipped_steps, state.bad_samples = int(total[4]), int(total[5])
        seconds = (time.perf_counter() - interval.began) / max(1, interval.steps)
        per_second = self.schedule.images_per_step / seconds
        record = Record(
            step=state.step,
            epoch=round(state.step / self.schedule.steps_per_epoch, 4),
            images=state.step * self.schedule.images_per_step,
            loss=total[0] / group.size / max(1, interval.steps),
            top1=total[1] / max(1.0, total[3]),
            lr=lr,
            grad_norm=total[2] / group.size / max(1, interval.steps),
            images_per_second=per_second,
            step_seconds=seconds,
            data_wait_seconds=state.data_wait_seconds,
            merge_seconds=state.merge_seconds,
            inter_node_bytes=state.inter_node_bytes,
            intra_node_bytes=state.intra_node_bytes,
            mfu=self.flops_per_image * per_second / self.peak_flops / topology.world_size if self.peak_flops else None,
            heads=topology.heads if everywhere else topology.heads_per_node,
            skipped_steps=state.skipped_steps,
            bad_samples=state.bad_samples,
            **(evaluation or {}),
        )
        if self.writer is not None:
            self.writer.write(record)
            progress.info(format_progress(record, self.schedule.total, self._seconds_left(state.step)))
        if self.endpoint is not None:
            self.endpoint.update(record, {key: count for key, count in sent.items() if count})
        interval.clear()
        return record

    def _seconds_left(self, step: int) -> float:
        done = step - self.started_step
        return (self.schedule.total - step) * (time.perf_counter() - self.started) / max(1, done)

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
