"""Values as bytes, for the link between nodes and for a quantised base: in few bits in blocks with a scale each.

A block is 64 values; its scale, a bf16 number, is its largest magnitude over 127 (int8) or 7 (int4), and values are
rounded to the nearest multiple. In nf4 the scale is the largest magnitude itself, and values are rounded to the nearest
of 16 levels between -1 and 1: quantiles of the normal distribution, which weights are near to (arXiv 2305.14314,
appendix E). Hence

    error    at most half a scale: 1/253 of the block's largest magnitude (int8), 1/13 (int4); bf16: 1/256 of the value;
             nf4: half the distance of two levels, 1/6.5 of the largest magnitude far from zero, 1/22 near it
    twice    what a message decodes to encodes to the same message: the largest value always is 127 (7, 1) scales

A block with a value that is not finite decodes to NaN as a whole, so that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
_LARGEST = {"int8": 127, "int4": 7, "nf4": 1}
"""Scales in the largest magnitude of a block."""
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
_NF4_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
_SCALE_BYTES = 2
_SMALLEST = torch.finfo(torch.bfloat16).tiny  # below it bf16 has fewer digits: such a block counts as zero


@dataclass(frozen=True, slots=True)
class Codec:
    """`precision`: fp32, bf16, int8, int4 or nf4. Everything is along the last dimension, row by row."""

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
        largest, n = _LARGEST[self.precision], values.shape[-1]
        blocks = F.pad(values, (0, -n % BLOCK)).unflatten(-1, (-(-n // BLOCK), BLOCK))
        scales = (blocks.abs().amax(-1) / largest).to(torch.bfloat16)
        scales = scales.masked_fill(scales < _SMALLEST, 0.0).masked_fill(~scales.isfinite(), torch.nan)
        multiples = (blocks / scales.float().unsqueeze(-1)).clamp_(-largest, largest).nan_to_num_(0.0)
        multiples = multiples.flatten(-2)[..., :n]
        if self.precision == "int8":
            packed = _bits(multiples.round().to(torch.int8), torch.uint8)
        else:
            steps = multiples.round() + 8 if self.precision == "int4" else _nearest_nf4(multiples)
            nibbles = F.pad(steps.to(torch.uint8), (0, n % 2))
            packed = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        return torch.cat([_bits(scales, torch.uint8), packed], -1)

    def decode(self, message: Tensor, values: int) -> Tensor:
        """Bytes [..., size(n)] as fp32 [..., n] for n `values`."""
        if self.exact:
            return _bits(message, torch.float32)
        if self.precision == "bf16":
            return _bits(message, torch.bfloat16).float()
        count = -(-values // BLOCK)
        scales, packed = message.split([_SCALE_BYTES * count, message.shape[-1] - _SCALE_BYTES * count], -1)
        if self.precision == "int8":
            multiples = packed.view(torch.int8).float()
        else:
            steps = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :values]
            multiples = steps.float() - 8 if self.precision == "int4" else _levels(NF4, steps)[steps.int()]
        if values % BLOCK:
            multiples = F.pad(multiples, (0, -values % BLOCK))
        blocks = multiples.unflatten(-1, (count, BLOCK)).mul_(_bits(scales, torch.bfloat16).float().unsqueeze(-1))
        return blocks.flatten(-2)[..., :values]

    def rounded(self, values: Tensor) -> Tensor:
        """What is left of fp32 `values` after a message."""
        return values if self.exact else self.decode(self.encode(values), values.shape[-1])


def _bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another type; `Tensor.view` itself minds strides, also of dimensions of one, and offsets."""
    flat = tensor.reshape(-1)
    # A compiler cannot ask for it; a weight, which it compiles, begins where it is held.
    if not torch.compiler.is_compiling() and flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize // dtype.itemsize)


def _nearest_nf4(multiples: Tensor) -> Tensor:
    """Indices of the nearest levels."""
    return torch.bucketize(multiples.contiguous(), _levels(_NF4_BETWEEN, multiples))


def _levels(table: Tensor, like: Tensor) -> Tensor:
    """A table where `like` is, without making the host wait for the device."""
    return table.to(like.device, non_blocking=True)
