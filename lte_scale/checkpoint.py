"""Sharded checkpoints that are whole or not there.

    RUN/checkpoints/
        step_00001000/            the final name: written under .tmp-step_00001000 and renamed when all ranks are done
            .metadata             which tensor lies where (torch.distributed.checkpoint)
            __0_0.distcp ...      the tensors, each rank its own
            train_state.json      the trainer's state, the topology
            config.yaml           the resolved configuration

Keys. Weights are flat fp32 vectors of which a rank holds any part, so that they load on any number of ranks:

    master/LAYER  momentum/LAYER  average/LAYER         the base, its outer momentum, its moving average
    product/LAYER                                       what resetless heads had merged at the last global merge
    replica_master/NAME  replica_momentum/  replica_average/
    node/K/LAYER                                        node K's compute weights, where nodes merge on their own
    head/N/...                                          factors, replica parameters, AdamW's state, data position
    history/RANK/BUCKET/I                               factors of earlier local merges of the window (factor path)

Loaded on the same topology, a run continues bit for bit. On another one:

    the number of heads is the same     heads keep factors, optimizer state and data position
    it differs                          heads are drawn anew, from the masters; the data goes on at the same epoch
    nodes had merged on their own       their progress since the last global merge is dropped

Only tensors and JSON are read: loading executes no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lte_scale.collectives import Collectives
from lte_scale.config.schema import CheckpointConfig
from lte_scale.contents import Pieces, Tensors, carries_over, check_model, copied, copy_in, take_positions, tensors_of
from lte_scale.log import log
from lte_scale.storage import read_metadata, read_tensors, reason

_NAME = re.compile(r"step_(\d{8,})")
_ABOUT = ("top1", "topology", "format", "heads", "position")  # in train_state.json besides the trainer's own state


def check_writable(run_dir: Path) -> None:
    """Create the run directory and prove that it can be written.

    Raises:
        ValueError: if it cannot.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = run_dir / "checkpoints" / ".probe"
        probe.write_text("written\n")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot write {run_dir} ({error.strerror}); choose a directory you may write"
        ) from error


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name) and _is_whole(p)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _is_whole(path: Path) -> bool:
    return (path / ".metadata").is_file() and (path / "train_state.json").is_file()


def resolve(location: str) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run.

    Raises:
        ValueError: if there is none.
    """
    path = Path(location)
    if _is_whole(path):
        return path
    if found := whole_checkpoints(path):
        return found[-1]
    siblings = whole_checkpoints(path.parent.parent)
    hint = (
        f"; the newest of its run is {siblings[-1]}" if siblings else "; name a run directory or one of its checkpoints"
    )
    raise ValueError(f"{location}: no checkpoint{hint}")


def best_checkpoint(run_dir: Path) -> Path:
    """The run's checkpoint with the best eval_top1.

    Raises:
        ValueError: if none was evaluated.
    """
    scored = [
        (top1, path) for path in whole_checkpoints(run_dir) if (top1 := _read_state(path).get("top1")) is not None
    ]
    if not scored:
        raise ValueError(f"{run_dir}: no checkpoint with an evaluation; leave out --best")
    return max(scored)[1]


class Checkpoints:
    """Saves and loads the checkpoints of a run, at most one save in flight. Every method is collective, but `poll`."""

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
        if self.first:
            for stale in (run_dir / "checkpoints").glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)

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
        with torch.no_grad(), pieces.merger.editable() as shards:
            tensors = {name: copied(value) for name, value in tensors_of(pieces, shards).items()}
        path = self.run_dir / "checkpoints" / f"step_{state['step']:08d}"
        described = {**state, "top1": top1, "topology": asdict(self.collectives.topology), "format": 1}
        described |= {"heads": self.collectives.topology.heads, "position": max(pieces.positions.values())}
        self._saving = self._executor.submit(self._write, path, tensors, described, config_text)
        if wait or not self.config.asynchronous:
            self.finish(meanwhile)

    def _write(self, path: Path, tensors: Tensors, state: dict[str, Any], config_text: str) -> None:
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            dcp_save(tensors, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None)
            if self.first:
                (temporary / "train_state.json").write_text(json.dumps(state, indent=2) + "\n")
                (temporary / "config.yaml").write_text(config_text)
                if path.exists():  # saved twice at one step: the files are equal
                    shutil.rmtree(path)
                os.rename(temporary, path)
                self._retain()
        except BaseException as error:  # DCP's CheckpointException is no Exception
            if self.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RuntimeError(f"checkpoint {path.name} could not be written: {reason(error)}") from error

    def _retain(self) -> None:
        """Keep the last ones and the best; the newest is always among them."""
        found = whole_checkpoints(self.run_dir)
        kept = set(found[-self.config.keep_last :])
        if self.config.keep_best:
            with contextlib.suppress(ValueError):
                kept.add(best_checkpoint(self.run_dir))
        for path in set(found) - kept:
            doomed = path.with_name(f".tmp-{path.name}")  # renamed first: half deleted it must not look whole
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

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
        try:
            self._saving.result()
        except RuntimeError as error:
            if self.first:
                log.warning("%s; training goes on, earlier checkpoints are untouched", error)
        self._saving = None

    def close(self) -> None:
        """Wait for a save in flight."""
        self.finish()
        self._executor.shutdown()

    def find(self, resume: str) -> Path | None:
        """The checkpoint to resume from: `auto` (newest of the run, if any), `never`, or a path.

        Raises:
            ValueError: if the path names none.
        """
        found: Path | None = None
        error: str | None = None
        if self.first and resume != "never":
            try:
                found = next(reversed(whole_checkpoints(self.run_dir)), None) if resume == "auto" else resolve(resume)
            except ValueError as caught:
                error = f"resume: {caught}"
        found, error = self.collectives.broadcast_object((found, error))
        if error:
            raise ValueError(error)
        return found

    def load(self, path: Path, pieces: Pieces) -> dict[str, Any]:
        """Load into `pieces`, in place; returns the trainer's state.

        Raises:
            ValueError: if the checkpoint is of another model.
        """
        state = _read_state(path)
        topology = self.collectives.topology
        same_place = state["topology"] == {**asdict(topology), "rank": 0}
        same_heads = state["heads"] == topology.heads
        metadata = read_metadata(path)
        merger = pieces.merger
        with torch.no_grad(), merger.editable() as shards:
            check_model(metadata, pieces, path)
            wanted = tensors_of(pieces, shards, loading=True)
            chosen = {n: t for n, t in wanted.items() if carries_over(n, same_place=same_place, same_heads=same_heads)}
            self._drop_what_is_missing(chosen, metadata, path)
            staged = {name: copied(value) for name, value in chosen.items()}
            read_tensors(staged, path, group=self.group, alone=self.group is None)
            late = {n for n in staged if n.startswith(("node/", "product/"))}
            copy_in({n: t for n, t in staged.items() if n not in late}, chosen)
        self._load_history(path, metadata, pieces, same_place)
        take_positions(pieces, staged, state, topology.heads)
        if not same_heads:
            self._say(f"{state['heads']} heads are now {topology.heads}: they are drawn anew from the merged weights")
            merger.replicas.write(merger.replicas.outer.masters)
        if any(name.startswith("node/") for name in metadata.state_dict_metadata) and not same_place:
            self._say("another topology: what nodes had merged on their own since the last global merge is dropped")
        merger.restore_products()
        merger.publish()
        with torch.no_grad(), merger.editable() as shards:
            targets = tensors_of(pieces, shards, loading=True)
            copy_in({n: staged[n] for n in late}, {n: targets[n] for n in late})
        return {key: value for key, value in state.items() if key not in _ABOUT}

    def _say(self, message: str) -> None:
        if self.first:
            log.warning(message)

    def _drop_what_is_missing(self, chosen: Tensors, metadata: Metadata, path: Path) -> None:
        missing = [name for name in chosen if name not in metadata.state_dict_metadata]
        for name in missing:
            del chosen[name]
        kinds = sorted({name.partition("/")[0] for name in missing})
        if kinds:
            self._say(f"{path} holds no {', '.join(kinds)}: they start anew")

    def _load_history(self, path: Path, metadata: Metadata, pieces: Pieces, same_place: bool) -> None:
        prefix = f"history/{self.collectives.topology.rank}/"
        names = sorted(n for n in metadata.state_dict_metadata if n.startswith(prefix)) if same_place else []
        found: dict[str, Tensor] = {}
        for name in names:
            stored = metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            found[name] = torch.empty(stored.size)
        read_tensors(found, path, group=self.group, alone=self.group is None)
        device = next(iter(pieces.heads.parameters().values())).device
        for number, bucket in enumerate(pieces.merger.buckets):
            mine = sorted(n for n in found if n.startswith(f"{prefix}{number:04d}/"))
            pieces.merger.history[bucket] = [found[n].to(device) for n in mine]


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "train_state.json").read_text())
    return state
