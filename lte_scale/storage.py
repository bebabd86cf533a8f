"""Reading a checkpoint's files: tensors and a table of them, no code; what is damaged is named."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_ENTRIES = {
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_StorageInfo",
    "_MEM_FORMAT_ENCODING",
}
_FILE = re.compile(r"__\d+_\d+\.distcp")
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class _Unpickler(pickle._Unpickler):
    """torch pickles the table: allow the classes of its entries and nothing that runs.

    It is the one written in Python because the one in C takes as much memory as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        entry = module in _MODULES and name in _ENTRIES  # whole names: one with dots would walk to anything
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if entry or dtype or (module, name) in _NAMES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def _member(kind: Any, name: str) -> Any:
    """What the first releases of Python 3.11 (Debian 12 has one) pickle a member of an enumeration as: getattr."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it takes {name} of {kind}, which is no part of a checkpoint")
    return _MEM_FORMAT_ENCODING[name]


class _Reader(FileSystemReader):
    """With the table at hand: of a large run it takes long to read."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        assert self.metadata.storage_meta is not None
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


def _is_table(metadata: Metadata) -> bool:
    """Whether all entries are tensors, in files of this directory.

    Entries of another kind are refused here because torch reads them as pickles, which run code.
    """
    try:
        tensors = all(
            isinstance(name, str) and isinstance(entry, TensorStorageMetadata) and entry.size.numel() >= 0
            for name, entry in metadata.state_dict_metadata.items()
        )
        files = all(
            isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo) and _FILE.fullmatch(info.relative_path)
            for index, info in metadata.storage_data.items()
        )
        return tensors and files and isinstance(metadata.storage_meta, StorageMeta)
    except (AttributeError, TypeError):  # what the classes hold may be anything
        return False


def read_metadata(checkpoint: Path) -> Metadata:
    """Which tensors a checkpoint holds, and where.

    Raises:
        ValueError: naming the file, if it is damaged or is no such table.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path}: cannot be read ({error})".splitlines()[0]) from error
    if not isinstance(metadata, Metadata) or not _is_table(metadata):
        raise ValueError(f"{path}: cannot be read (it is no table of tensors)")
    return metadata


def read_tensors(
    into: Mapping[str, Tensor],
    path: Path,
    metadata: Metadata,
    *,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> None:
    """Fill tensors from a checkpoint of which `metadata` was read, by key. Collective in `group` unless `alone`.

    Raises:
        ValueError: naming the checkpoint, if a file of it is damaged or missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(dict(into), storage_reader=_Reader(path, metadata), process_group=group, no_dist=alone)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(
            f"{path}: is damaged ({reason(error)}); name another checkpoint, or delete it to go on from the one before"
        ) from error


def reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {reason(cause)}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
