"""What a model costs, before anything runs: its shapes, its FLOPs per image, what autograd keeps for the backward pass.

FLOPs and activations are counted on the model itself, traced with fake tensors: no memory, no accelerator, a second or
two for a large model. Shapes as in `adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lte_scale.adapters import LTEPatchConv, ReplicaPatchConv
from lte_scale.live import LiveBytes
from lte_scale.low_rank import as_written
from lte_scale.model import Heads


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted weight [out, into] with factors of rank `rank`.

    Attributes:
        unit: the block it is gathered with; empty for what lies outside of all blocks.
    """

    out: int
    into: int
    rank: int
    unit: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.into

    @property
    def values(self) -> int:
        return self.out * self.into

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Values of A and of B of one head."""
        return self.rank * self.into, self.rank * self.out

    @property
    def factor_values(self) -> int:
        """Values of A and B of one head."""
        return sum(self.factor_sizes)


@dataclass(frozen=True, slots=True)
class Shapes:
    """All that memory and traffic depend on: the adapted layers by name, and the replica parameters of one head."""

    layers: Mapping[str, Layer]
    replica_values: int

    @property
    def values(self) -> int:
        """Parameters of the model without heads."""
        return sum(layer.values for layer in self.layers.values()) + self.replica_values

    @property
    def factor_values(self) -> int:
        return sum(layer.factor_values for layer in self.layers.values())

    @property
    def trainable_values(self) -> int:
        """Values that one head trains."""
        return self.factor_values + self.replica_values


def shapes_of(heads: Heads, blocks: Sequence[str] = ()) -> Shapes:
    """The shapes of an adapted model; `blocks` are the names of the modules whose weights are gathered together."""
    layers = {}
    for name, layer in heads.linears.items():
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
        layers[name] = Layer(layer.B.shape[1], layer.A.shape[2], layer.A.shape[1], unit)
    replicas = sum(parameter.numel() for parameter in heads.replicas.values())
    return Shapes(layers, replicas // len(heads.ids))


def training_flops(model: nn.Module, heads: Heads, image_size: int) -> int:
    """FLOPs per image of one training step of an adapted model: forward, input gradients and the factors' gradients.

    Multiply and add are two; matrix products alone are counted, attention without the recomputation of its scores,
    and no recomputed activations: model FLOPs, as MFU is defined (arXiv 2204.02311, appendix B).

    Args:
        model: adapted by `attach`, not sharded yet; its tensors may be on any device, `meta` too.
    """
    count = len(heads.ids)
    return step_flops(model, batch=count, image_size=image_size) // count


def step_flops(model: nn.Module, *, batch: int, image_size: int) -> int:
    """FLOPs of forward and backward of `batch` images through any model, by what of it requires gradients."""
    # The plain kernel computes its scores once; the fused ones count those that their backward pass computes again.
    with (
        _fake(model) as tensors,
        sdpa_kernel(SDPBackend.MATH),
        as_written(),
        FlopCounterMode(display=False) as counter,
    ):
        _forward(model, tensors, _images(model, batch, image_size)).sum().backward()
    return int(counter.get_total_flops())


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes kept between forward and backward: outside of the blocks, in each block, and each block's input.

    Attributes:
        working: bytes alive beside them where a backward pass holds the most: gradients of activations, casts.
    """

    outside: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    working: int = 0

    def total(self, *, checkpointed: bool) -> int:
        """The most that a training step holds at once."""
        return self.saved(checkpointed=checkpointed) + self.working

    def saved(self, *, checkpointed: bool) -> int:
        """What autograd keeps; with checkpointing the blocks' inputs, and one block at a time."""
        kept = max(self.blocks, default=0) if checkpointed else sum(self.blocks)
        return self.outside + sum(self.inputs) + kept


def saved_activations(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    batch: int,
    image_size: int,
    bf16: bool,
    gathered: Collection[str] = (),
) -> Activations:
    """What a forward and backward pass of `batch` images holds with fused attention, parameters and gradients aside.

    Args:
        blocks: the modules that activation checkpointing recomputes.
        bf16: under bf16 autocast.
        gathered: parameters that the engine hands over in bf16; of others autocast's own bf16 copies count.
    """
    saved: dict[int, tuple[int, int]] = {}  # storage -> bytes, index of the block or -1
    inputs: dict[int, int] = {}
    alive: list[object] = []  # a freed storage's address would be taken for another's
    present = -1

    def enter(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal present
        present = blocks.index(block)
        storage = arguments[0].untyped_storage()
        alive.append(storage)
        if storage._cdata not in saved:
            inputs[storage._cdata] = storage.nbytes()

    def leave(block: nn.Module, arguments: object, output: object) -> None:
        nonlocal present
        present = -1

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        saved.setdefault(storage._cdata, (storage.nbytes(), present))
        return tensor

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with _fake(model, gathered if bf16 else ()) as tensors:
            keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), keeping:
                _forward(model, tensors, _images(model, batch, image_size))
            ours = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    finally:
        for hook in hooks:
            hook.remove()
    kept = [entry for storage, entry in saved.items() if storage not in ours and storage not in inputs]
    found = Activations(
        outside=sum(size for size, block in kept if block < 0),
        blocks=tuple(sum(size for size, block in kept if block == i) for i in range(len(blocks))),
        inputs=tuple(inputs.values()),
    )
    peak = _peak_of_step(model, batch=batch, image_size=image_size, bf16=bf16, gathered=gathered)
    return replace(found, working=max(0, peak - found.saved(checkpointed=False)))


def _peak_of_step(model: nn.Module, *, batch: int, image_size: int, bf16: bool, gathered: Collection[str]) -> int:
    with _fake(model, gathered if bf16 else ()) as tensors:
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.grad = torch.zeros_like(tensor)  # a first gradient would be kept as it is, and counted
        gradients = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
        images = _images(model, batch, image_size)
        with LiveBytes([images, *tensors.values(), *gradients]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = _forward(model, tensors, images)
            output.sum().backward()
    return live.peak


@contextmanager
def _fake(model: nn.Module, in_bf16: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Fake tensors in place of all parameters and buffers, those named in bf16."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors: dict[str, Tensor] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            dtype = torch.bfloat16 if name in in_bf16 and tensor.is_floating_point() else tensor.dtype
            tensors[name] = torch.empty(tensor.shape, dtype=dtype, device="cpu", requires_grad=tensor.requires_grad)
        yield tensors


def _images(model: nn.Module, batch: int, image_size: int) -> Tensor:
    return torch.empty(batch, _channels(model), image_size, image_size, device="cpu")


def _forward(model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    output: Tensor = torch.func.functional_call(model, dict(tensors), (images,))
    return output.float()


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, LTEPatchConv):
            return int(module.A.shape[2] // math.prod(module.kernel))
        if isinstance(module, ReplicaPatchConv):
            return int(module.weight.shape[2] // math.prod(module.kernel))
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("model: no convolution that reads images was found; choose a vision transformer of timm")
