"""Bytes of tensors alive at once, real or fake ones: what an allocator would have to hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while the mode is on, each until it is freed.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors that are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # An address may be another storage's as soon as this one is gone.
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False

    def _free(self, address: int, count: int) -> None:
        self._seen.discard(address)
        self.now -= count
