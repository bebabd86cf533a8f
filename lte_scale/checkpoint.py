"""Sharded checkpoints that are whole or not there.

    RUN/checkpoints/
        step_00001000/            the final name: written under .tmp-step_00001000 and renamed when all ranks are done
            .metadata             which tensor lies where (torch.distributed.checkpoint)
            __0_0.distcp ...      the tensors, each rank its own
            train_state.json      the trainer's state, the topology
            config.yaml           the resolved configuration
            SHA256SUMS            of all of these; a checkpoint whose files differ from it is not loaded

Keys. Weights are flat fp32 vectors of which a rank holds any part, so that they load on any number of ranks:

    master/LAYER  momentum/LAYER  average/LAYER         the base, its outer momentum, its moving average
    product/LAYER                                       what resetless heads had merged at the last global merge
    replica_master/NAME  replica_momentum/  replica_average/
    node/K/LAYER                                        node K's compute weights, where nodes merge on their own
    copy/LAYER                                          all nodes' compute weights, where they lag behind the master
    head/N/...                                          factors, replica parameters, AdamW's state, data position
    history/RANK/BUCKET/I                               factors of earlier local merges of the window (factor path)
    unsent/RANK/LAYER/sent, shared; unsent/RANK/sent, shared
                                                        what messages of merges in few bits have missed (dense path;
                                                        replica parameters)

Loaded on the same topology, a run continues bit for bit. On another one:

    the number of heads is the same     heads keep factors, optimizer state and data position
    it differs                          heads are drawn anew, from the masters; the data goes on at the same epoch
    nodes had merged on their own       their progress since the last global merge is dropped
    merges were in few bits             what they had not sent of dense changes is dropped

A run that goes on from an earlier checkpoint than its newest, or from none, leaves a course: where it saves, what there
is of the same or a later step is renamed to step_00001000.superseded. It is neither resumed from nor deleted.

Only tensors and JSON are read: loading executes no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lte_scale import checksums
from lte_scale.collectives import Collectives
from lte_scale.config.schema import CheckpointConfig
from lte_scale.contents import (
    ABOUT,
    FORMAT,
    Pieces,
    Tensors,
    carries_over,
    check_all_there,
    check_model,
    copied,
    copy_in,
    load_history,
    read_state,
    take_positions,
    tensors_of,
    unsent_that_is_lost,
)
from lte_scale.log import log
from lte_scale.run_dir import best_checkpoint, candidates, named_checkpoints, step_of, whole_checkpoints
from lte_scale.storage import read_metadata, read_tensors, reason


class Checkpoints:
    """Saves and loads the checkpoints of a run, at most one save in flight. Every method is collective, but `poll`.

    Attributes:
        failed: why the last save that has ended could not be written, the same on every rank; empty where it was.
        ended: called on every rank with the step of a save that has ended, and its seconds (None if it failed).
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, collectives: Collectives) -> None:
        self.run_dir, self.config, self.collectives = run_dir, config, collectives
        self.first = collectives.topology.rank == 0
        world = collectives.topology.world_size
        # Its own group: a background save must not mix its messages with the training's.
        self.group: dist.ProcessGroup | None = None
        if world > 1:
            self.group = cast("dist.ProcessGroup", dist.new_group(list(range(world)), backend="gloo"))
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a world of one needs no group
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._step, self._began = 0, 0.0
        self.failed = ""
        self.ended: Callable[[int, float | None], None] = lambda step, seconds: None

    def save(
        self,
        pieces: Pieces,
        state: Mapping[str, Any],
        config_text: str,
        *,
        top1: float | None,
        wait: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy everything now and write it, in the background unless `wait` or configured otherwise.

        A save that fails warns and leaves training and earlier checkpoints as they were. `meanwhile` is called now and
        then while this waits for a save, and so for all ranks.
        """
        self.finish(meanwhile)
        with pieces.opened() as shards:
            tensors = {name: copied(value) for name, value in tensors_of(pieces, shards).items()}
        path = self.run_dir / "checkpoints" / f"step_{state['step']:08d}"
        described = {**state, "top1": top1, "topology": asdict(self.collectives.topology), "format": FORMAT}
        described |= {"heads": self.collectives.topology.heads, "position": max(pieces.positions.values())}
        self._step, self._began = int(state["step"]), time.monotonic()
        self._saving = self._executor.submit(self._write, path, tensors, described, config_text)
        if wait or not self.config.asynchronous:
            self.finish(meanwhile)

    def _write(self, path: Path, tensors: Tensors, state: dict[str, Any], config_text: str) -> None:
        temporary, began = path.with_name(f".tmp-{path.name}"), time.monotonic()
        try:
            dcp_save(tensors, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None)
            sums = "".join(self._of_all_ranks(self._sums_of_mine(temporary)))
            failure = self._complete(temporary, path, sums, state, config_text) if self.first else ""
            if failure := "".join(self._of_all_ranks(failure)):
                raise OSError(failure)
        except BaseException as error:  # DCP's CheckpointException is no Exception
            if self.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RuntimeError(f"checkpoint {path.name} could not be written: {reason(error)}") from error
        if self.first:
            log.info("saved checkpoint %s in %.1f s", path.name, time.monotonic() - began)
            self._retain()

    def _complete(self, temporary: Path, path: Path, sums: str, state: Mapping[str, Any], config_text: str) -> str:
        """Write what is there once, and give the checkpoint its name. Returns why that failed, for all ranks to see."""
        try:
            check_all_there(temporary, sums)
            _write_synced(temporary / "train_state.json", json.dumps(state, indent=2) + "\n")
            _write_synced(temporary / "config.yaml", config_text)
            sums += checksums.listed(checksums.digests(temporary, checksums.WRITTEN_ONCE))
            _write_synced(temporary / checksums.LIST, sums)
            self._supersede(path)
            os.rename(temporary, path)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    def remove_unfinished(self) -> None:
        """Delete what earlier starts were writing when they ended. Not for a start that may still be refused: the run
        may be alive."""
        if self.first:
            for stale in (self.run_dir / "checkpoints").glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def _sums_of_mine(self, folder: Path) -> str:
        """Lines of the list for the files this rank has written; none, which shows, where they cannot be read."""
        mine = [path.name for path in folder.glob(f"__{self.collectives.topology.rank}_*")]
        try:
            return checksums.listed(checksums.digests(folder, mine))
        except OSError as error:
            log.warning("%s: written but not to be read: %s", folder, error)
            return ""

    def _supersede(self, path: Path) -> None:
        """Put aside what an earlier course of the run has saved at this step and later ones."""
        for other in named_checkpoints(self.run_dir):
            if step_of(other) >= step_of(path):
                aside = other.with_name(f"{other.name}.superseded")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(other, aside)
                log.warning("%s is of a course that this run has left: it is now %s", other, aside.name)

    def _retain(self) -> None:
        """Keep the last ones and the best; the newest is always among them."""
        found = whole_checkpoints(self.run_dir)
        kept = set(found[-self.config.keep_last :])
        if self.config.keep_best:
            with contextlib.suppress(ValueError):
                kept.add(best_checkpoint(self.run_dir))
        for path in set(found) - kept:
            doomed = path.with_name(f".tmp-{path.name}")  # renamed first: half deleted it must not look whole
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("%s is one too many and could not be deleted: %s", path, error)

    def poll(self) -> None:
        """Take note of a save that has ended meanwhile."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def finish(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for a save in flight."""
        if self._saving is None:
            return
        while not futures.wait([self._saving], timeout=0.2).done:
            meanwhile()
        seconds: float | None = time.monotonic() - self._began
        try:
            self._saving.result()
            self.failed = ""
        except RuntimeError as error:
            seconds, self.failed = None, str(error)
            if self.first:
                log.warning("%s; training goes on, earlier checkpoints are untouched", error)
        self._saving = None
        self.ended(self._step, seconds)

    def close(self) -> None:
        """Wait for a save in flight."""
        self.finish()
        self._executor.shutdown()

    def find(self, resume: str) -> Path | None:
        """The checkpoint to resume from: `auto` (newest of the run that is sound, if any), `never`, or a path.

        Raises:
            ValueError: if the path names none, or a damaged one; if the run has checkpoints and all are damaged.
        """
        found: list[Path] = []
        error: str | None = None
        if self.first:
            try:
                found = candidates(self.run_dir, resume)
            except ValueError as caught:
                error = f"resume: {caught}"
        found, error = self.collectives.broadcast_object((found, error))
        if error:
            raise ValueError(error)
        for path in found:
            damage = self._damage(path)
            if not damage:
                return path
            if resume != "auto":
                raise ValueError(f"resume: {path} is damaged: {damage}; name another checkpoint")
            self._say(f"{path} is damaged: {damage}; looking for the one before")
        if found:
            raise ValueError(
                f"resume: all {len(found)} checkpoints in {self.run_dir / 'checkpoints'} are damaged; set "
                "resume=never to begin anew"
            )
        return None

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint's files, each rank reading some of them; the same word on every rank."""
        topology = self.collectives.topology
        mine = checksums.damage(path, share=topology.rank, shares=topology.world_size)
        return next(filter(None, self._of_all_ranks(mine)), "")

    def _of_all_ranks(self, value: str) -> list[str]:
        found = [value]
        if self.group is not None:
            found = [""] * self.collectives.topology.world_size
            dist.all_gather_object(found, value, self.group)
        return found

    def load(self, path: Path, pieces: Pieces) -> dict[str, Any]:
        """Load into `pieces`, in place; returns the trainer's state.

        Raises:
            ValueError: if the checkpoint is of another model.
        """
        state = read_state(path)
        topology = self.collectives.topology
        same_place = state["topology"] == {**asdict(topology), "rank": 0}
        metadata = read_metadata(path)
        there = {name.split("/")[1] for name in metadata.state_dict_metadata if name.startswith("head/")}
        same_heads = state["heads"] == topology.heads and there.issuperset(map(str, topology.job_heads))
        merger = pieces.merger
        with pieces.opened() as shards:
            check_model(metadata, pieces, path)
            wanted = tensors_of(pieces, shards, loading=True)
            chosen = {n: t for n, t in wanted.items() if carries_over(n, same_place=same_place, same_heads=same_heads)}
            if forgotten := unsent_that_is_lost(metadata, chosen):
                chosen = {n: t for n, t in chosen.items() if n not in forgotten}
                self._say(f"{path}: what merges in few bits had not sent yet means nothing here and is dropped")
            missing = [name for name in chosen if name not in metadata.state_dict_metadata]
            if missing:
                kinds = sorted({name.partition("/")[0] for name in missing})
                self._say(f"{path} holds no {', '.join(kinds)}: they start anew")
            staged = {name: copied(value) for name, value in chosen.items() if name not in missing}
            read_tensors(staged, path, metadata, group=self.group, alone=self.group is None)
            averages = [name for name in missing if name.startswith(("average/", "replica_average/"))]
            staged |= {name: staged[name.replace("average/", "master/", 1)] for name in averages}
            late = {n for n in staged if n.startswith(("node/", "product/", "copy/"))}
            copy_in({n: t for n, t in staged.items() if n not in late}, chosen)
        load_history(path, metadata, pieces, group=self.group, same_place=same_place)
        take_positions(pieces, staged, state, topology.heads)
        if not same_heads:
            self._say(f"{state['heads']} heads are now {topology.heads}: they are drawn anew from the merged weights")
            merger.replicas.write(merger.replicas.outer.masters)
        if any(name.startswith("node/") for name in metadata.state_dict_metadata) and not same_place:
            self._say("another topology: what nodes had merged on their own since the last global merge is dropped")
        merger.restore()
        with pieces.opened() as shards:
            targets = tensors_of(pieces, shards, loading=True)
            copy_in({n: staged[n] for n in late}, {n: targets[n] for n in late})
        return {key: value for key, value in state.items() if key not in ABOUT}

    def _say(self, message: str) -> None:
        if self.first:
            log.warning(message)


def _write_synced(path: Path, text: str) -> None:
    """On the disk before it is renamed, or a power failure leaves a checkpoint of empty files."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
