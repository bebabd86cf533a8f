"""The small truths of a run: where it is, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lte_scale.config.schema import Config
from lte_scale.schedules import lr_at, rewarmed, to_steps


@dataclass
class TrainState:
    """All resumable truth besides tensors and the data position. Counters are cumulative over resumes.

    `phase_seconds` is the mean over node 0's ranks, `sent_bytes` the bytes that a node has sent by `scope/purpose`;
    `skipped_steps`, `bad_samples` and `bad_shards` count over all ranks, as of the last global merge, and those `_here`
    on this rank (on rank 0, from the totals of the run that is resumed). `merges` are those that nodes which are jobs
    of their own have agreed on (`quorum`).
    """

    classes: int = 0
    step: int = 0
    evaluated_step: int = 0
    saved_step: int = 0
    best_top1: float = 0.0
    data_wait_seconds: float = 0.0
    merge_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    measured_step: int = 0
    restarts: int = 0
    merges: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    bad_shards: int = 0
    skipped_here: int = 0
    bad_here: int = 0
    bad_shards_here: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any], where: Path) -> TrainState:
        """The state that a checkpoint's JSON holds.

        Raises:
            ValueError: if a key is unknown or its value is of another kind.
        """
        kinds = {field.name: type(getattr(cls(), field.name)) for field in fields(cls)}
        for key, value in values.items():
            kind = kinds.get(key)
            numbers = value.values() if isinstance(value, dict) else [value]
            right = isinstance(value, dict) == (kind is dict) and all(type(n) in (int, float) for n in numbers)
            if kind is None or not right or (kind is int and type(value) is not int):
                shown = f"{ascii(key)[1:-1]} = {value!a}"[:60]  # text of the file, line breaks and all
                raise ValueError(f"{where}: its state has {shown}; name another checkpoint")
        return cls(**values)

    def resumed(self, *, first: bool) -> None:
        """After loading: the counts so far go on with the first rank."""
        self.restarts += 1
        self.skipped_here = self.skipped_steps if first else 0
        self.bad_here = self.bad_samples if first else 0
        self.bad_shards_here = self.bad_shards if first else 0

    def sent(self, scope: str) -> int:
        """Bytes that a node has sent in `scope`."""
        return sum(count for key, count in self.sent_bytes.items() if key.startswith(f"{scope}/"))


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
        return cls(
            config=config,
            total=config.merge.cadence.window_end(max(1, to_steps(config.train.duration, per_epoch))),
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
        window = self.config.merge.every
        return rewarmed(step, window=window, share=s.rewarm) * lr_at(
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
        rate, steps = self.config.merge.weight_decay, self.config.merge.cadence.covered(step)
        return rate * sum(self.lr(self.config.optimizer.lr, s) for s in steps) if rate else 0.0
