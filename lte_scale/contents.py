"""What a checkpoint holds: every tensor of a run by its key, the state; and what carries over to another topology."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lte_scale.divergence import Divergence
from lte_scale.flat import FlatPart
from lte_scale.merge import Merger
from lte_scale.model import Heads
from lte_scale.optim import HeadOptimizer
from lte_scale.storage import read_metadata, read_tensors

Tensors = dict[str, Tensor]

FORMAT = 1
ABOUT = ("top1", "topology", "format", "heads", "position")
"""In train_state.json besides the trainer's own state."""


@dataclass(frozen=True)
class Pieces:
    """What a checkpoint holds besides the trainer's state.

    Attributes:
        positions: the data position of each head.
        divergence: the losses that heads are judged by; none where nobody judges them.
    """

    heads: Heads
    merger: Merger
    optimizer: HeadOptimizer
    positions: dict[int, int]
    divergence: Divergence | None = None

    @contextmanager
    def opened(self) -> Iterator[Mapping[str, Tensor]]:
        """Within, `tensors_of` these may be read and written: the engine's parts of all weights, moments in fp32."""
        with torch.no_grad(), self.merger.editable() as shards, self.optimizer.decoded():
            yield shards


def tensors_of(pieces: Pieces, shards: Mapping[str, Tensor], *, loading: bool = False) -> Tensors:
    """Every tensor of the run by its key, not copied; while the pieces are `opened`."""
    merger, heads = pieces.merger, pieces.heads
    rank, node = merger.topology.rank, merger.topology.node
    found: Tensors = {}
    for name, own in merger.ownership.items():
        total = own.shape[0] * own.shape[1]
        for kind, values in (
            ("master", merger.outer.masters),
            ("momentum", merger.outer.momenta),
            ("average", merger.outer.averages),
            ("product", merger.products.mean if merger.arrangement.two_level else {}),
        ):
            if name in values:
                found[f"{kind}/{name}"] = FlatPart(values[name], own.own[0], total)
        if merger.arrangement.two_level:
            found[f"node/{node}/{name}"] = FlatPart(shards[name], own.compute[0], total)
        if merger.arrangement.followed:
            found[f"copy/{name}"] = FlatPart(shards[name], own.compute[0], total)
    found |= {f"unsent/{rank}/{name}": value for name, value in merger.dense.unsent().items()}
    if merger.region is not None:
        found |= {f"unsent/{rank}/region/{name}": value for name, value in merger.region.unsent().items()}
    if (feedback := merger.replicas.feedback) is not None:
        found |= {f"unsent/{rank}/sent": feedback.unsent, f"unsent/{rank}/shared": feedback.unshared}
    replicas = merger.replicas.outer
    for kind, values in (("master", replicas.masters), ("momentum", replicas.momenta), ("average", replicas.averages)):
        found |= {f"replica_{kind}/{name}": value for name, value in values.items()}
    for index, head in enumerate(heads.ids):
        found |= {f"head/{head}/{name}": value for name, value in _of_head(pieces, index, head).items()}
        if (losses := pieces.divergence) is not None:  # a rank that shares a head has losses of its own
            key = f"loss/{head}/{merger.topology.head_member}"
            found |= {f"{key}/recent": losses.recent[index], f"{key}/merged": losses.merged[index]}
            found[f"{key}/strikes"] = losses.strikes[index]
    if not loading:
        for number, (_, packed) in enumerate(merger.history.items()):
            found |= {f"history/{rank}/{number:04d}/{i:04d}": tensor for i, tensor in enumerate(packed)}
    return found


def _of_head(pieces: Pieces, index: int, head: int) -> dict[str, Tensor]:
    heads, optimizer = pieces.heads, pieces.optimizer
    count = len(heads.ids)
    found = {}
    for name, parameter in heads.parameters().items():
        found[name] = parameter.detach().view(count, -1)[index]
        for moment, value in optimizer.moments(parameter).items():
            found[f"{name}/{moment}"] = value.view(count, -1)[index]
        found[f"{name}/step"] = optimizer.adam.state[parameter]["step"]
    for name, layer in heads.linears.items():
        if layer.A_prev is not None and layer.B_prev is not None:
            found |= {f"{name}.A_prev": layer.A_prev[index].view(-1), f"{name}.B_prev": layer.B_prev[index].view(-1)}
    found["position"] = torch.tensor(pieces.positions[head])
    found["skipped_in_a_row"] = torch.tensor(optimizer.skipped_in_a_row[index])
    return found


def carries_over(name: str, *, same_place: bool, same_heads: bool) -> bool:
    """Whether the tensor of this key means the same where nodes, ranks or heads are others."""
    kind = name.partition("/")[0]
    return same_place if kind in ("node", "unsent") else same_heads if kind in ("head", "product", "loss") else True


def unsent_that_is_lost(metadata: Metadata, chosen: Tensors) -> set[str]:
    """Keys of what messages have missed that cannot be loaded to `chosen`, as far as this rank or rank 0 would."""
    stored = metadata.state_dict_metadata
    lost = {name for name in stored if name.startswith("unsent/0/") and name not in chosen}
    for name, value in chosen.items():
        entry = stored.get(name)
        if name.startswith("unsent/") and isinstance(entry, TensorStorageMetadata) and entry.size != value.size():
            lost.add(name)
    return lost


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU that later steps do not change."""
    return value.copied() if isinstance(value, FlatPart) else value.detach().to("cpu", copy=True)


def copy_in(source: Tensors, target: Tensors) -> None:
    """Write the values of `source` to the tensors of the same keys, in place."""
    for name, value in source.items():
        into = target[name]
        if isinstance(value, FlatPart) and isinstance(into, FlatPart):
            into.part.copy_(value.part)
        else:
            into.copy_(value)


def take_positions(pieces: Pieces, staged: Tensors, state: Mapping[str, Any], heads: int) -> None:
    """Data position and count of skipped steps of every head of this rank, from the checkpoint."""
    for index, head in enumerate(pieces.heads.ids):
        position, skipped = staged.get(f"head/{head}/position"), staged.get(f"head/{head}/skipped_in_a_row")
        if position is not None and skipped is not None:
            pieces.positions[head] = int(position)
            pieces.optimizer.skipped_in_a_row[index] = int(skipped)
        else:  # other heads share the epoch now: go on where they all were
            pieces.positions[head] = int(state["position"]) * int(state["heads"]) // heads


def load_history(
    path: Path, metadata: Metadata, pieces: Pieces, *, group: dist.ProcessGroup | None, same_place: bool
) -> None:
    """The factors of earlier local merges of the window, where they mean the same. Collective."""
    prefix = f"history/{pieces.merger.topology.rank}/"
    of_all = [n for n in metadata.state_dict_metadata if n.startswith("history/")] if same_place else []
    names = sorted(n for n in of_all if n.startswith(prefix))
    found: Tensors = {}
    bytes_there = sum(file.stat().st_size for file in path.glob("*.distcp"))
    for name in names:
        stored = metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if stored.size.numel() > bytes_there:  # before a size that somebody wrote there takes the memory
            raise ValueError(f"{path}: is damaged ({name} has more values than there are); name another checkpoint")
        found[name] = torch.empty(stored.size)
    if of_all:
        read_tensors(found, path, metadata, group=group, alone=group is None)
    device = next(iter(pieces.heads.parameters().values())).device
    for number, bucket in enumerate(pieces.merger.buckets):
        mine = sorted(n for n in found if n.startswith(f"{prefix}{number:04d}/"))
        pieces.merger.history[bucket] = [found[n].to(device) for n in mine]


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, and what `save` has put beside it.

    Raises:
        ValueError: naming the file, if it is damaged or of another format.
    """
    file = path / "train_state.json"
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); name another checkpoint") from error
    numbers = ("step", "heads", "position")
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or not all(key in state for key in ABOUT)
        or not all(type(state.get(key)) is int and 0 <= state[key] < 2**53 for key in numbers)
        or not isinstance(state["top1"], int | float | None)
    ):
        raise ValueError(f"{file}: is no state of a checkpoint of format {FORMAT}; name another checkpoint")
    return state


def check_all_there(path: Path, listed: str) -> None:
    """Whether the files of all ranks are where this one sees them, and on the list of sums.

    Raises:
        OSError: naming one that is not.
    """
    stored = {entry.relative_path for entry in read_metadata(path).storage_data.values()}
    if absent := sorted(stored - set(os.listdir(path))):
        raise OSError(f"{absent[0]} of another rank is not there: all nodes must share the file system of run_dir")
    if unlisted := sorted(name for name in stored if f"  {name}\n" not in listed):
        raise OSError(f"{unlisted[0]} cannot be read again by the rank that wrote it")


def check_model(metadata: Metadata, pieces: Pieces, path: Path) -> None:
    """Whether the checkpoint's layers and parameters are this model's, and its heads mean the same.

    Raises:
        ValueError: naming a tensor that differs, or the mode.
    """
    merger = pieces.merger
    wanted = {f"master/{name}": own.shape[0] * own.shape[1] for name, own in merger.ownership.items()}
    wanted |= {f"replica_master/{name}": value.numel() for name, value in merger.replicas.outer.masters.items()}
    heads = {name.split("/")[1] for name in metadata.state_dict_metadata if name.startswith("head/")}
    head = f"head/{min(heads, default='0')}/"  # nodes that are jobs of their own have saved theirs alone
    wanted |= {head + name: p.numel() // len(pieces.heads.ids) for name, p in pieces.heads.parameters().items()}
    stored = {
        name: entry.size.numel()
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(("master/", "replica_master/", head))
    }
    differing = [name for name in sorted(wanted) if stored.get(name) != wanted[name]]
    differing += [n for n in sorted(stored) if n.startswith(("master/", "replica_master/")) and n not in wanted]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path}: is of another model or rank: {name} has {stored.get(name, 'no')} values there and "
            f"{wanted.get(name, 'none')} here ({len(differing)} such tensors); set another run_dir, or resume=never"
        )
    mode = "resetless" if any(name.endswith(".A_prev") for name in stored) else "reset"
    if mode != pieces.heads.mode:  # what resetless heads hold is in the weights already
        raise ValueError(
            f"{path}: was trained with adapters.mode={mode}, not {pieces.heads.mode}; set it back, or another run_dir"
        )
