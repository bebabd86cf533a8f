"""The interface of an engine, the engine of a single process, and what all engines do before they shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lte_scale.adapters import LTELinear
from lte_scale.config.schema import BaseConfig
from lte_scale.initial import base_slice
from lte_scale.model import Heads

Slice = tuple[int, int]
"""Start and end of a part of a weight, in elements of the row-major flattened [O, I] matrix."""


def split_evenly(part: Slice, count: int) -> tuple[Slice, ...]:
    """`part` in `count` slices of equal length, the last ones shorter or empty."""
    start, stop = part
    size = -(-(stop - start) // count)
    return tuple((min(start + i * size, stop), min(start + (i + 1) * size, stop)) for i in range(count))


def cut(shape: tuple[int, int], ranks: int, rank: int, *, rows: bool) -> Slice:
    """The part of a weight [O, I] at global rank `rank`, sharded over `ranks`: by rows, as `torch.chunk` cuts, or flat.

    Ranks are numbered node by node, so the index inside a node is the same for the peers of other nodes.
    """
    out, into = shape
    unit = into if rows else 1
    start, stop = split_evenly((0, out * into // unit), ranks)[rank % ranks]
    return start * unit, stop * unit


def cut_from(flat: Tensor, held: Slice, part: Slice) -> Tensor:
    """The elements of `part` from a flat tensor that holds `held`."""
    return flat[part[0] - held[0] : part[1] - held[0]]


class Engine(Protocol):
    """Shards the frozen weights and gathers them for forward and backward.

    Attributes:
        tied_steps: the first optimizer steps of a process in which all ranks of the world wait for one another, even
            where the base is gathered inside the nodes.
    """

    model: nn.Module
    tied_steps: int

    def slice_of(self, name: str, rank: int) -> Slice:
        """The part of weight `name` that global rank `rank` stores for computing."""
        ...

    def editable(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """This rank's part of every weight as flat fp32 tensors; what is written is what the next forward reads."""
        ...


def repeated_blocks(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, child name) of every outermost element of a list or sequence of layers that holds adapted layers."""
    found: list[tuple[nn.Module, str]] = []

    def visit(module: nn.Module) -> None:
        for name, child in module.named_children():
            adapted = any(isinstance(m, LTELinear) for m in child.modules())
            if isinstance(module, nn.ModuleList | nn.Sequential) and adapted and not isinstance(child, LTELinear):
                found.append((module, name))
            else:
                visit(child)

    visit(model)
    return found


def wrap_blocks(model: nn.Module, *, checkpoint_activations: bool, compile: bool) -> list[nn.Module]:
    """The blocks, wrapped. Order: 1. activation checkpointing, 2. compile, 3. shard (the engine's part)."""
    blocks = []
    for parent, name in repeated_blocks(model):
        block = parent.get_submodule(name)
        if checkpoint_activations:
            block = checkpoint_wrapper(block)
            parent.register_module(name, block)
        if compile:
            block.compile()
        blocks.append(block)
    return blocks


def materialise(model: nn.Module, device: torch.device, weights: torch.device | None = None) -> None:
    """Move `model` to `device`, and what was on the meta device, the dense weights, to `weights` if they are offloaded.

    The weights become NaN, so that a forgotten initialisation shows; bytes of quantised ones too.
    """

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        return torch.full_like(tensor, math.nan if tensor.is_floating_point() else 255, device=weights or device)

    model._apply(move)


@torch.no_grad()
def fill_base(engine: Engine, heads: Heads, *, rank: int, seed: int) -> None:
    """Give every weight its initial values, each rank its own part.

    Raises:
        RuntimeError: naming a tensor of the model that nobody initialised.
    """
    with engine.editable() as shards:
        for name, layer in heads.linears.items():
            start, stop = engine.slice_of(name, rank)
            shape = (layer.B.shape[1], layer.A.shape[2])
            shards[name].copy_(base_slice(name, shape, start, stop, std=layer.initial_std, seed=seed))
        poisoned = [name for name, shard in shards.items() if not shard.isfinite().all()]
    poisoned += [name for name, parameter in heads.parameters().items() if not parameter.isfinite().all()]
    if poisoned:
        raise RuntimeError(f"model: {', '.join(poisoned)} not initialised")


class SingleEngine:
    """`engine: none`: one process that holds the whole base.

    What products read is the fp32 weights themselves, or a copy that is renewed at each edit: in bf16, quantised, or
    of weights in CPU memory.
    """

    tied_steps = 0

    def __init__(
        self, model: nn.Module, heads: Heads, base: BaseConfig, *, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self.model, self.device = model, device
        self.bases = {name: layer.base for name, layer in heads.linears.items()}
        home = torch.device("cpu") if base.offload == "cpu" else device
        for held in self.bases.values():
            if not held.quantised:
                held.weight.data = held.weight.data.to(compute_dtype)
        materialise(model, device)
        self.parts = {name: self._part(name, home) for name in self.bases}
        for name, held in self.bases.items():
            held.master = partial(self._whole, name)

    def _part(self, name: str, home: torch.device) -> Tensor:
        held = self.bases[name]
        if held.weight.dtype == torch.float32 and home.type == self.device.type:
            return held.weight.data.view(-1)
        return torch.full((math.prod(held.shape),), math.nan, device=home)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.parts[name].to(self.device, dtype).view(self.bases[name].shape)

    def slice_of(self, name: str, rank: int) -> Slice:
        return 0, math.prod(self.bases[name].shape)

    @contextmanager
    def editable(self) -> Iterator[Mapping[str, Tensor]]:
        yield self.parts
        for name, held in self.bases.items():
            held.renew(held.weight.data, self.parts[name], self.device)
