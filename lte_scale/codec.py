"""Values as bytes for the link between nodes: fp32 and bf16 as they are, int8 and int4 in blocks with a scale each.

A block is 64 values; its scale, a bf16 number, is its largest magnitude over 127 (int8) or 7 (int4), and values are
rounded to the nearest multiple. Hence

    error    at most half a scale: 1/253 of the block's largest magnitude (int8), 1/13 (int4); bf16: 1/256 of the value
    twice    what a message decodes to encodes to the same message: the largest value always is 127 (or 7) scales

A block with a value that is not finite decodes to NaN as a whole, so that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
_LEVELS = {"int8": 127, "int4": 7}
_SCALE_BYTES = 2
_SMALLEST = torch.finfo(torch.bfloat16).tiny  # below it bf16 has fewer digits: such a block counts as zero


@dataclass(frozen=True, slots=True)
class Codec:
    """`precision` is that of `merge.precision`. Everything is along the last dimension, row by row."""

    precision: str = "fp32"

    @property
    def exact(self) -> bool:
        return self.precision == "fp32"

    def size(self, values: int) -> int:
        """Bytes of a message of so many values."""
        if self.precision in ("fp32", "bf16"):
            return values * (4 if self.exact else 2)
        packed = values if self.precision == "int8" else -(-values // 2)
        return -(-values // BLOCK) * _SCALE_BYTES + packed

    def encode(self, values: Tensor) -> Tensor:
        """fp32 [..., n] as bytes [..., size(n)]."""
        if self.exact:
            return _bits(values, torch.uint8)
        if self.precision == "bf16":
            return _bits(values.to(torch.bfloat16), torch.uint8)
        levels, n = _LEVELS[self.precision], values.shape[-1]
        blocks = F.pad(values, (0, -n % BLOCK)).unflatten(-1, (-(-n // BLOCK), BLOCK))
        scales = (blocks.abs().amax(-1) / levels).to(torch.bfloat16)
        scales = scales.masked_fill(scales < _SMALLEST, 0.0).masked_fill(~scales.isfinite(), torch.nan)
        multiples = (blocks / scales.float().unsqueeze(-1)).round_().clamp_(-levels, levels)
        steps = multiples.nan_to_num_(0.0).to(torch.int8).flatten(-2)[..., :n]
        if self.precision == "int4":
            nibbles = _bits(F.pad(steps + 8, (0, n % 2)), torch.uint8)
            packed = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        else:
            packed = _bits(steps, torch.uint8)
        return torch.cat([_bits(scales, torch.uint8), packed], -1)

    def decode(self, message: Tensor, values: int) -> Tensor:
        """Bytes [..., size(n)] as fp32 [..., n] for n `values`."""
        if self.exact:
            return _bits(message, torch.float32)
        if self.precision == "bf16":
            return _bits(message, torch.bfloat16).float()
        count = -(-values // BLOCK)
        scales, packed = message.split([_SCALE_BYTES * count, message.shape[-1] - _SCALE_BYTES * count], -1)
        if self.precision == "int4":
            steps = _bits(torch.stack([packed & 15, packed >> 4], -1).flatten(-2), torch.int8) - 8
        else:
            steps = _bits(packed, torch.int8)
        blocks = F.pad(steps[..., :values].float(), (0, -values % BLOCK)).unflatten(-1, (count, BLOCK))
        return (blocks * _bits(scales, torch.bfloat16).float().unsqueeze(-1)).flatten(-2)[..., :values]

    def rounded(self, values: Tensor) -> Tensor:
        """What is left of fp32 `values` after a message."""
        return values if self.exact else self.decode(self.encode(values), values.shape[-1])


def _bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another type; `Tensor.view` itself minds strides, also of dimensions of one, and offsets."""
    flat = tensor.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize // dtype.itemsize)
