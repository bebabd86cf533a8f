"""AdamW's moments in 16 or 8 bits between steps.

    bf16   values rounded to bf16
    log8   powers of 2^(1/8), in blocks of 64 values with a power of two each that none exceeds; a sign and 7 bits of
           exp_avg (16 octaves, what is less is zero), 8 bits of exp_avg_sq (32 octaves, what is less is the least)

A step of AdamW moves exp_avg_sq by a thousandth of itself (1 - beta2), far less than two such values are apart: rounded
to the nearest it would never move. So rounding is up or down, in shares that keep the mean. What decides is a sequence
that fills [0, 1) evenly over the steps and over neighbouring values (Roberts' R2, of the plane's golden ratio): ranks
that share a head round alike, and a resumed run as one that was not.

What has not changed is not rounded again: decoding and encoding gives the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 64
_KINDS = ("exp_avg", "exp_avg_sq")
_PER_OCTAVE = 8
_AT_A_TIME = 2**16  # blocks, 16 MB in fp32
_R2 = (0.7548776662466927, 0.5698402909980532)


def moment_bytes(precision: str, values: int) -> int:
    """Of one moment of so many values."""
    return {"fp32": 4 * values, "bf16": 2 * values, "log8": values + -(-values // BLOCK)}[precision]


class HeldMoments:
    """Holds the moments of an optimizer in few bits; within `decoded()` they are in its state, in fp32."""

    def __init__(self, optimizer: Optimizer, precision: str, heads: int) -> None:
        """
        Args:
            precision: `bf16` or `log8`.
            heads: leading dimension of all parameters, by views; no two heads share a block.
        """
        self.optimizer, self.precision, self.heads = optimizer, precision, heads
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.held: dict[str, list[Tensor]] = {}
        self._hold()

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """Within, what is written to the state counts."""
        counts = [self.heads * -(-p.numel() // self.heads // BLOCK) for p in self.parameters]
        for kind in _KINDS:
            blocks = _decoded(self.held.pop(kind), signed=kind == "exp_avg")
            for parameter, part in zip(self.parameters, blocks.split(counts), strict=True):
                values = part.view(self.heads, -1)[:, : parameter.numel() // self.heads]
                self.optimizer.state[parameter][kind] = values.contiguous().view(parameter.shape)
        try:
            yield
        finally:
            self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        state = self.optimizer.state
        step = state[self.parameters[0]]["step"]
        for kind in _KINDS:
            per_head = [state[p].pop(kind).view(self.heads, -1) for p in self.parameters]
            blocks = torch.cat([F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(-1, BLOCK) for rows in per_head])
            self.held[kind] = self._encoded(blocks, step, signed=kind == "exp_avg")

    def _encoded(self, blocks: Tensor, step: Tensor, *, signed: bool) -> list[Tensor]:
        column = torch.arange(BLOCK, device=blocks.device) * _R2[0]
        row = torch.arange(_AT_A_TIME, device=blocks.device).unsqueeze(1) * _R2[1]
        # In double precision: of a large step fp32 would keep few digits behind the point.
        shift = (step.to(blocks.device).double() * _R2[1]).frac().float()
        parts = []
        for part in blocks.split(_AT_A_TIME):
            dither = (row[: len(part)].frac() + column + shift).frac_()
            parts.append((_bf16(part, dither),) if self.precision == "bf16" else _log8(part, dither, signed=signed))
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _bf16(values: Tensor, dither: Tensor) -> Tensor:
    """fp32 as bf16, up where the digits that fall away are more than `dither` in [0, 1) leaves room for."""
    bits = values.view(torch.int32) + (dither * 2**16).int()
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _log8(blocks: Tensor, dither: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 [N, 64] as codes [N, 64] (0 is zero, c > 0 is 2^((1 - c) / 8)) and exponents of two [N, 1]."""
    mantissas, exponents = torch.frexp(blocks.abs().amax(1, keepdim=True))
    exponents = (exponents - (mantissas == 0.5).int()).clamp_(-126, 127)
    octaves = -torch.ldexp(blocks.abs(), -exponents).log2()
    levels = octaves.mul_(_PER_OCTAVE * 2**10).round_().div_(2**10)  # log2 is a little off: a level must be its own
    whole = levels.floor()
    to_lower = (1 - torch.exp2((whole - levels) / _PER_OCTAVE)) / (1 - 2 ** (-1 / _PER_OCTAVE))
    codes = whole + 1 + (dither < to_lower)
    if signed:
        codes = codes.masked_fill_(codes > 127, 0) + 128 * (blocks < 0)
    else:
        codes = codes.clamp_(max=255).masked_fill_(blocks == 0, 0)
    return codes.to(torch.uint8), exponents.to(torch.int8)


def _decoded(held: list[Tensor], *, signed: bool) -> Tensor:
    """fp32 [N, 64]."""
    if len(held) == 1:
        return held[0].float()
    codes, exponents = held
    levels = (codes & 127 if signed else codes).float() - 1
    values = torch.exp2(exponents - levels / _PER_OCTAVE).masked_fill_(levels < 0, 0.0)
    return torch.where(codes > 127, -values, values) if signed else values
