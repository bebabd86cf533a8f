"""The small truths of a run: where it is, and how long it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lte_scale.config.schema import Config
from lte_scale.schedules import lr_at, to_steps


@dataclass
class TrainState:
    """All resumable truth besides tensors and the data position. Counters are cumulative over resumes.

    `skipped_here` and `bad_here` count on this rank (on rank 0, from the totals of the run that is resumed);
    `skipped_steps` and `bad_samples` over all ranks, as of the last global merge.
    """

    classes: int = 0
    step: int = 0
    evaluated_step: int = 0
    best_top1: float = 0.0
    data_wait_seconds: float = 0.0
    merge_seconds: float = 0.0
    inter_node_bytes: int = 0
    intra_node_bytes: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    skipped_here: int = 0
    bad_here: int = 0


@dataclass(frozen=True)
class Schedule:
    """The run's durations, in optimizer steps, and its learning rate."""

    config: Config
    total: int
    warmup: int
    decay: int
    evaluate: int
    checkpoint: int
    images_per_step: int
    steps_per_epoch: float

    @classmethod
    def of(cls, config: Config, samples: int, heads: int) -> Schedule:
        """Durations for `heads` heads on an epoch of `samples`; the total is rounded up to whole windows."""
        images = heads * config.train.batch_size * config.train.accumulate
        per_epoch = samples / images
        every = config.merge.every
        return cls(
            config=config,
            total=math.ceil(max(1, to_steps(config.train.duration, per_epoch)) / every) * every,
            warmup=to_steps(config.schedule.warmup, per_epoch),
            decay=to_steps(config.schedule.decay, per_epoch),
            evaluate=to_steps(config.evaluate.every, per_epoch),
            checkpoint=to_steps(config.checkpoint.every, per_epoch),
            images_per_step=images,
            steps_per_epoch=per_epoch,
        )

    def lr(self, peak: float, step: int) -> float:
        """Learning rate of optimizer step `step` for a peak rate."""
        s = self.config.schedule
        return lr_at(
            step,
            name=s.name,
            peak=peak,
            total=self.total,
            warmup=self.warmup,
            decay=self.decay,
            final_ratio=s.final_ratio,
        )

    def master_decay(self, step: int) -> float:
        """Fraction that decoupled weight decay takes from the master at the merge after `step`."""
        rate = self.config.merge.weight_decay
        window = range(step - self.config.merge.every + 1, step + 1)
        return rate * sum(self.lr(self.config.optimizer.lr, s) for s in window) if rate else 0.0
