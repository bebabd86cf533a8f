"""The training run: build once, then step -> merge? -> evaluate? -> checkpoint? -> record, until the last step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F

from lte_scale.assemble import assemble, flops_per_image, train_stream
from lte_scale.checkpoint import Checkpoints
from lte_scale.collectives import Collectives
from lte_scale.config import differences, dump, load_config
from lte_scale.config.schema import Config
from lte_scale.contents import Pieces
from lte_scale.data import Batch, open_index
from lte_scale.divergence import Divergence, Withdrawal
from lte_scale.evaluate import Evaluator
from lte_scale.initial import seed_of
from lte_scale.log import log
from lte_scale.merge import Place
from lte_scale.precision import with_precision
from lte_scale.preemption import Preemption
from lte_scale.profiling import Profiler
from lte_scale.quorum import Interrupted
from lte_scale.recorder import Recorder
from lte_scale.schedules import due, passed
from lte_scale.state import Schedule, TrainState
from lte_scale.watchdog import Watchdog

NOT_SAVED = 3
"""Exit code of a run whose last checkpoint could not be written."""
_LAST_SAVE_PAUSES_SECONDS = (2.0, 10.0)


class TrainingError(RuntimeError):
    """The run cannot go on; what there was is saved."""


class Trainer:
    """One run of one configuration on this process's part of the world. A context manager.

    Attributes:
        batches: what is trained on next, while it trains.
    """

    batches: Iterator[Batch]

    def __init__(self, config: Config, collectives: Collectives, device: torch.device) -> None:
        config, topology = with_precision(config, device), collectives.topology
        self.config, self.collectives, self.topology, self.device = config, collectives, topology, device
        index = open_index(config.data.train, allow_pipe=config.data.allow_pipe)
        classes = config.model.num_classes or index.num_classes
        self.schedule = Schedule.of(config, index.samples, topology.heads)
        self.stream = train_stream(config, index, classes, topology)
        lte = assemble(config, classes, collectives, device)
        self.engine, self.heads, self.merger, self.optimizer = lte.engine, lte.heads, lte.merger, lte.optimizer
        self.autocast = lte.autocast
        apart = config.optimizer.average != "all"  # else all heads are one
        ratio = config.train.diverged * apart
        self.divergence = Divergence(
            self.merger, self.optimizer, collectives, ratio=ratio, classes=classes, device=device
        )
        self.evaluator = Evaluator(config, classes, collectives, device, self.autocast)
        run_dir = Path(config.run_dir)
        self.checkpoints = Checkpoints(run_dir, config.checkpoint, collectives)
        self.recorder = Recorder(
            config,
            collectives,
            self.schedule,
            self.merger,
            device=device,
            flops_per_image=partial(flops_per_image, config, classes, topology),
        )
        self.clock, self.checkpoints.ended = self.recorder.clock, self.recorder.checkpointed
        self.profiler = Profiler(config.profile.steps, run_dir, collectives)
        self.preemption = Preemption(
            collectives,
            collectives.world if config.base.crosses_nodes or config.optimizer.average == "all" else collectives.node,
            tied_steps=self.engine.tied_steps,
            may_end_at=self.merger.cadence.at_rest,
        )
        self.watchdog = Watchdog(collectives, run_dir, config.watchdog.seconds)
        self.preemption.meanwhile = lambda: self.watchdog.beat(self.state.step, "agreeing on the last step")
        self.state, self.position = TrainState(classes=classes), 0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.merger.close()
        self.watchdog.close()
        self.checkpoints.close()
        self.profiler.close()
        self.recorder.close()
        self.preemption.close()

    def run(self) -> int:
        """Train to the end, or until a signal. Returns the exit code: 0, NOT_SAVED, or 128 + the signal."""
        before = self.place
        try:
            self.merger.join(self)
        except Interrupted:
            log.info("stopped while waiting for the other nodes; the same command resumes")
            return 128 + (self.preemption.received or signal.SIGTERM)
        if self.place != before and self.state.step == self.schedule.total:
            log.info("the other nodes have trained to the end")
            self.save_last(top1=None)
        return self.train()

    def train(self) -> int:
        """The loop."""
        state, schedule, cadence = self.state, self.schedule, self.merger.cadence
        self.batches = self.stream.iterate(self.position)
        self.profiler.stepped(state.step)
        while state.step < schedule.total:
            state.step += 1
            self.train_step()
            if cadence.due(state.step):
                self.merge()
            last = state.step == schedule.total
            everywhere = last or cadence.lands(state.step) == 0
            results = None
            if everywhere and (last or passed(state.step, schedule.evaluate, state.evaluated_step)):
                results = self.evaluate()
            self.preemption.notice()
            recorded = bool(due(state.step, self.config.metrics.every, schedule.total) or results)
            if recorded:
                self.record(everywhere, results)
            at_rest = not cadence.under_way(state.step)
            saved = last or (at_rest and passed(state.step, schedule.checkpoint, state.saved_step))
            if saved:
                top1 = results["eval_top1"] if results else None
                self.save_last(top1) if last else self.save(top1=top1, wait=False)
            self.checkpoints.poll()
            self.stepped()
            # Last: groups that decide must not keep others waiting in a record or a save.
            if self.preemption.should_stop(state.step):
                return self.stop(everywhere, recorded=recorded, saved=saved)
        self.recorder.summarise(state)
        return NOT_SAVED if self.checkpoints.failed else 0

    @property
    def place(self) -> Place:
        """Where this run is."""
        return Place(self.state.step, self.position, self.state.merges)

    def go_to(self, place: Place) -> None:
        """Be where the other nodes of the run are."""
        if place.position != self.position:
            self.batches = self.stream.iterate(place.position)
        self.state.step, self.position, self.state.merges = place

    def interrupted(self) -> bool:
        """Whether to wait no longer for other nodes."""
        self.watchdog.beat(self.state.step, "waiting for other nodes")
        return bool(self.preemption.received)

    def stepped(self) -> None:
        """Let those know that watch over the steps."""
        self.watchdog.beat(self.state.step)
        self.recorder.stepped(self.state.step)
        self.profiler.stepped(self.state.step)

    def stop(self, everywhere: bool, *, recorded: bool, saved: bool) -> int:
        """End after this step on all ranks, with a record and a checkpoint. Returns the exit code."""
        if not recorded:
            self.record(everywhere, None)
        if not saved:
            self.save_last(top1=None)
        with self.saving():
            self.checkpoints.finish()
        self.recorder.summarise(self.state)
        if self.preemption.reason:
            where = "not saved" if self.checkpoints.failed else f"saved at step {self.state.step}"
            raise TrainingError(f"{self.preemption.reason}; {where}")
        before = ", from an earlier step" if self.checkpoints.failed else ""
        log.info("stopped after step %d; the same command resumes%s", self.state.step, before)
        return 128 + (self.preemption.received or signal.SIGTERM)

    def train_step(self) -> None:
        """One optimizer step of every head of this process, over `train.accumulate` micro-batches."""
        config, heads = self.config, len(self.heads.ids)
        # Stochastic depth is a function of seed, step and rank, so that a resumed run repeats it without saved state.
        torch.manual_seed(seed_of("step", config.seed, self.state.step, self.topology.whole.rank))
        losses, correct = torch.zeros(2, heads, device=self.device)
        images = 0
        for _ in range(config.train.accumulate):
            batch = self.next_batch()
            with self.clock("forward"):
                x, targets, labels = (
                    t.to(self.device, non_blocking=True) for t in (batch.images, batch.targets, batch.labels)
                )
                with self.autocast:
                    logits = self.engine.model(x).float()
                smoothing = config.augment.label_smoothing if targets.ndim == 1 else 0.0
                each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
                micro = each.view(heads, -1).mean(1) / config.train.accumulate
            with self.clock("backward"):
                micro.sum().backward()
            losses += micro.detach()
            correct += (logits.detach().argmax(1) == labels).view(heads, -1).sum(1)
            images += len(labels)
        if self.state.step == 1:
            self.check_all_trained()
        with self.clock("optimizer"):
            norms, skipped = self.optimizer.step(losses, lambda peak: self.schedule.lr(peak, self.state.step))
        self.recorder.interval.add(losses, correct, norms, images)
        self.divergence.follow(losses)
        if any(skipped):
            self.after_skips(skipped)

    def next_batch(self) -> Batch:
        """The next batch, with the time waited for it and the damage met on the way taken down."""
        began = time.perf_counter()
        with self.clock("data_wait"):
            batch = next(self.batches)
        self.state.data_wait_seconds += time.perf_counter() - began
        self.position = batch.position
        self.state.bad_here += batch.damaged
        self.state.bad_shards_here += batch.shards
        self.recorder.damaged(batch.damaged, batch.shards)
        for name in batch.bad:
            log.warning("skipped damaged %s", name)
        return batch

    def check_all_trained(self) -> None:
        """A layer whose weights the model uses without calling it would silently not be trained."""
        unused = self.optimizer.without_gradient()
        if unused:
            raise ValueError(
                f"model.name: {self.config.model.name} does not use {unused[0]} through its layer's forward "
                f"({len(unused)} such parameters), so its heads would not be trained; choose another model"
            )

    def after_skips(self, skipped: list[bool]) -> None:
        """Count skipped steps; a head that keeps failing starts again."""
        step = self.state.step
        for index, (head, bad) in enumerate(zip(self.heads.ids, skipped, strict=True)):
            if bad:
                self.state.skipped_here += 1
                self.recorder.skipped(head)
                log.warning("step %d: head %d skipped, its loss or gradient is not finite", step, head)
            row = self.optimizer.skipped_in_a_row[index]
            if row >= self.config.train.max_skipped:
                self.withdrawn(self.divergence.withdraw(index, step, f"it skipped {row} steps in a row"))

    def withdrawn(self, *heads: Withdrawal) -> None:
        """Tell of heads that have started again; give up, saved, when one does little else."""
        for found in heads:
            self.recorder.withdrawn(found.head)
            told = f"step {self.state.step}: head {found.head} withdrawn, {found.reason}"
            log.warning("%s; it starts again from the base", told)
            if found.hopeless:
                self.preemption.fail(f"{told}, once more; lower optimizer.lr or adapters.alpha")

    def merge(self) -> None:
        """Merge what is due after this step, inside the node or between nodes; after the last step all there is."""
        step, cadence = self.state.step, self.merger.cadence
        last = step == self.schedule.total
        began = time.perf_counter()
        if last or cadence.lands(step) is not None or cadence.is_regional(step):
            self.preemption.meeting(step)
        if cadence.departs(step) == 0 and passed(step, self.config.metrics.heads_every, self.state.measured_step):
            self.state.measured_step = step
            self.recorder.measure()
        with self.clock("merge"):
            self.withdrawn(*self.divergence.before_merge(step))
            try:
                self.merger.merge(step, decay=self.schedule.master_decay(step), last=last)
            except Interrupted:
                log.info("step %d: stopped while waiting for the other nodes to merge", step)
            self.optimizer.restart(self.config.merge.optimizer_state)
        self.state.merge_seconds += time.perf_counter() - began

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the merged weights, and of their moving average where there is one."""
        results: dict[str, float] = {}
        if self.evaluator.index is None:
            return results
        # It forks data workers, and one forked while a thread of a save holds a lock waits for that lock for ever.
        with self.saving():
            self.checkpoints.finish(lambda: self.preemption.waiting(self.state.step))
        with self.clock("evaluate"), self.merger.merged(average=self.config.train.ema_decay > 0):
            progress = partial(self.watchdog.beat, self.state.step, "evaluating")
            progress()
            results = self.evaluator(self.engine.model, progress=progress)
        self.state.evaluated_step = self.state.step
        self.state.best_top1 = max(self.state.best_top1, results["eval_top1"])
        return results

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what may wait for a save, which may take longer than a step."""
        self.watchdog.beat(self.state.step, "saving", patience=4)
        with self.clock("checkpoint"):
            yield

    def pieces(self) -> Pieces:
        """What a checkpoint holds besides `state`."""
        return Pieces(
            heads=self.heads,
            merger=self.merger,
            optimizer=self.optimizer,
            positions=dict.fromkeys(self.heads.ids, self.position),
            divergence=self.divergence,
        )

    def record(self, everywhere: bool, evaluation: dict[str, float] | None) -> None:
        """Write metrics of the steps since the last record: of the node, or after a global merge of all."""
        lr = self.schedule.lr(self.config.optimizer.lr, self.state.step)
        with self.clock("record"):
            self.recorder.record(self.state, lr, everywhere=everywhere, evaluation=evaluation)

    def save(self, *, top1: float | None, wait: bool) -> None:
        """Save after this step, when the save before is through."""
        self.state.saved_step = self.state.step
        with self.saving():
            self.checkpoints.save(
                self.pieces(),
                asdict(self.state),
                dump(self.config),
                top1=top1,
                wait=wait,
                meanwhile=lambda: self.preemption.waiting(self.state.step),
            )

    def save_last(self, top1: float | None) -> None:
        """Save where no later save can make up for this one: tried again after a while, for the disk may be cleared."""
        self.save(top1=top1, wait=True)
        for pause in _LAST_SAVE_PAUSES_SECONDS:
            if not self.checkpoints.failed:
                return
            time.sleep(pause)
            self.save(top1=top1, wait=True)
        if self.checkpoints.failed and self.topology.rank == 0:
            log.error("%s: what was trained since the checkpoint before is not saved", self.checkpoints.failed)

    def resume(self) -> None:
        """Load the checkpoint that `resume` names, if there is one."""
        found = self.checkpoints.find(self.config.resume)
        if found is not None:
            pieces = self.pieces()
            self.state = TrainState.read(self.checkpoints.load(found, pieces), found)
            self.position = pieces.positions[self.heads.ids[0]]
            self.state.resumed(first=self.topology.rank == 0)
            log.info("resumed from %s at step %d of %d", found, self.state.step, self.schedule.total)
            for change in differences(load_config(found / "config.yaml"), self.config):
                log.info("changed since that checkpoint: %s", change)
        self.recorder.resume(self.state)
        self.checkpoints.remove_unfinished()
