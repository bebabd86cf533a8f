"""The layers of LTE: a frozen dense weight with H low-rank heads, and replica parameters with one copy per head.

Shapes: H heads in this process, M rows per head, R rank, I in, O out features. A batch is head-major: the first
1/H of its samples belong to the first head. Whatever is trainable has H as its leading dimension, or H is 1.

`layout.active` selects what a forward pass sees: the heads, or the base alone with the replica parameters of the
first head (merged weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_scale.apex import LayerNorm
from lte_scale.codec import Codec
from lte_scale.low_rank import compute_dtype, low_rank_linear


@dataclass(slots=True)
class Layout:
    """How a batch divides into heads; one object shared by all layers of a model."""

    heads: int = 1
    active: bool = True
    samples_per_head: int = 1

    @property
    def split(self) -> int:
        """Parts in which a forward pass treats the batch."""
        return self.heads if self.active else 1


def lte_linear_reference(
    x_HMI: Tensor,
    weight_OI: Tensor,
    A_HRI: Tensor,
    B_HOR: Tensor,
    scale: float,
    bias_HO: Tensor | None = None,
    A_prev_HRI: Tensor | None = None,
    B_prev_HOR: Tensor | None = None,
) -> Tensor:
    """The specification of `LTELinear`, head by head: `(W + s (B_n A_n - B'_n A'_n)) x + b_n` as [H, M, O].

    arXiv 2402.16828, section 3; A' and B' are the factors at the last merge (resetless) and may be left out.
    """
    outputs = []
    for h in range(x_HMI.shape[0]):
        effective_OI = weight_OI + scale * B_HOR[h] @ A_HRI[h]
        if A_prev_HRI is not None and B_prev_HOR is not None:
            effective_OI = effective_OI - scale * B_prev_HOR[h] @ A_prev_HRI[h]
        y_MO = x_HMI[h] @ effective_OI.T
        outputs.append(y_MO if bias_HO is None else y_MO + bias_HO[h])
    return torch.stack(outputs)


class BaseWeight(nn.Module):
    """The frozen dense weight W [O, I] of a layer: a module of its own, which an engine can gather for its call.

    Attributes:
        weight: W, or in a `quantised` precision its bytes [O, S], row by row (`codec`).
        master: with a quantised weight the engine's way to W in a dtype, from the fp32 parts of all ranks.
    """

    master: Callable[[torch.dtype], Tensor]

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.quantised = shape, ""
        self.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    def quantise(self, precision: str) -> None:
        """Hold the weight in `precision`; before an engine gives it memory."""
        out, into = self.shape
        self.quantised = precision
        held = torch.empty(out, Codec(precision).size(into), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(held, requires_grad=False)

    def renew(self, held: Tensor, part: Tensor, device: torch.device) -> None:
        """Write fp32 `part`, whole rows of W, flat, to the same rows of what is held; computed on `device`."""
        if self.quantised:
            held.copy_(Codec(self.quantised).encode(part.view(-1, self.shape[1]).to(device)))
        else:
            held.view(-1).copy_(part)

    def forward(self, x: Tensor, bias: Tensor | None = None, *factors: Tensor | None) -> Tensor:
        """`W x + b`; or with `factors` (A, B, A', B') `low_rank_linear`, b [H, O].

        Without heads a quantised weight is not read but the master: what is evaluated is what is exported.
        """
        if not factors:
            return self._of_master(x, bias) if self.quantised else F.linear(x, self.weight.to(compute_dtype(x)), bias)
        A, B, *previous = factors
        weight = self.weight if self.quantised else self.weight.to(x.dtype)
        return low_rank_linear(x, weight, cast(Tensor, A), cast(Tensor, B), bias, *previous, quantised=self.quantised)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _of_master(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`W x + b`; bringing W together is no part of a compiled block."""
        return F.linear(x, self.master(compute_dtype(x)), bias)


class LTELinear(nn.Module):
    """`y = W x + s B_n A_n x + b_n`: W [O, I] frozen and shared, A [H, R, I], B [H, O, R] and b [H, O] per head.

    In resetless mode `A_prev` and `B_prev` hold the factors at the last merge. Their product is subtracted in the
    forward pass by one concatenated product of rank 2R, unless `folded`: then the base this layer reads belongs to
    its one head and already lacks it, and resetless costs what reset costs.
    """

    A_prev: Tensor | None
    B_prev: Tensor | None
    initial_std: float = 0.02

    def __init__(
        self,
        layout: Layout,
        shape: tuple[int, int],
        *,
        rank: int,
        scale: float,
        mode: Literal["reset", "resetless"],
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        out, into = shape
        heads = layout.heads
        self.layout, self.scale, self.folded = layout, scale, False
        self.base = BaseWeight(shape)
        # NaN, so that a forgotten initialisation fails at once.
        self.A = nn.Parameter(torch.full((heads, rank, into), math.nan))
        self.B = nn.Parameter(torch.full((heads, out, rank), math.nan))
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(heads, -1).clone())
        resetless = mode == "resetless"
        self.register_buffer("A_prev", torch.full_like(self.A.data, math.nan) if resetless else None)
        self.register_buffer("B_prev", torch.full_like(self.B.data, math.nan) if resetless else None)

    def forward(self, x: Tensor) -> Tensor:
        layout, bias = self.layout, self.bias
        if not layout.active:
            return cast(Tensor, self.base(x, None if bias is None else bias[0]))
        dtype = compute_dtype(x)
        factors = [(self.A * self.scale).to(dtype), self.B.to(dtype), None, None]
        if self.A_prev is not None and self.B_prev is not None and not self.folded:
            factors[2:] = [(self.A_prev * self.scale).to(dtype), self.B_prev.to(dtype)]
        return cast(Tensor, self.base(x.to(dtype), None if bias is None else bias.to(dtype), *factors))

    def extra_repr(self) -> str:
        return f"out={self.B.shape[1]}, in={self.A.shape[2]}, heads={self.A.shape[0]}, rank={self.A.shape[1]}"


class LTEPatchConv(LTELinear):
    """A convolution whose stride is its kernel, as the linear map over patches that it is: [B,C,Y,X] to [B,O,y,x]."""

    kernel: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        return over_patches(super().forward, x, self.kernel)


def over_patches(linear: Callable[[Tensor], Tensor], x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """[B,C,Y,X] to [B,O,y,x] by a linear map over the patches of a kernel."""
    (ky, kx), (batch, channels) = kernel, x.shape[:2]
    ny, nx = x.shape[2] // ky, x.shape[3] // kx
    patches = x[:, :, : ny * ky, : nx * kx].reshape(batch, channels, ny, ky, nx, kx).permute(0, 2, 4, 1, 3, 5)
    y = linear(patches.reshape(batch, ny * nx, channels * ky * kx))
    return y.transpose(1, 2).reshape(batch, -1, ny, nx)


class ReplicaLinear(nn.Module):
    """A linear layer that every head trains densely in its own copy: weight [H, O, I], bias [H, O]."""

    def __init__(self, layout: Layout, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(weight.detach().expand(layout.heads, -1, -1).clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(layout.heads, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.layout.split == 1:
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        x_HMI = x.reshape(self.layout.heads, -1, x.shape[-1])
        y_HMO = torch.bmm(x_HMI, self.weight.mT)
        if self.bias is not None:
            y_HMO = y_HMO + self.bias.unsqueeze(1)
        return y_HMO.reshape(*x.shape[:-1], -1)


class ReplicaPatchConv(ReplicaLinear):
    """The same for a convolution whose stride is its kernel: [B,C,Y,X] to [B,O,y,x]."""

    kernel: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        return over_patches(super().forward, x, self.kernel)


class ReplicaNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension with an affine of its own per head: weight and bias [H, D]."""

    def __init__(self, layout: Layout, weight: Tensor, bias: Tensor | None, *, eps: float, rms: bool) -> None:
        super().__init__()
        self.layout, self.eps, self.rms = layout, eps, rms
        self.layer_norm: LayerNorm = F.layer_norm
        self.weight = nn.Parameter(weight.detach().expand(layout.heads, -1).clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(layout.heads, -1).clone())

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = x.shape[-1:]
        return F.rms_norm(x, shape, weight, self.eps) if self.rms else self.layer_norm(x, shape, weight, bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout.split == 1:
            return self._normalise(x, self.weight[0], None if self.bias is None else self.bias[0])
        x_HMD = self._normalise(x, None, None).reshape(self.layout.heads, -1, x.shape[-1])
        weight = self.weight.unsqueeze(1)
        y_HMD = x_HMD * weight if self.bias is None else torch.addcmul(self.bias.unsqueeze(1), x_HMD, weight)
        return y_HMD.view(x.shape)


class PerSample(nn.Module):
    """Parametrization of a bare parameter for H > 1 heads: one copy per head, repeated for each of its samples.

    `token` parameters [1, ...] (class token, position embedding) become [B, ...]; a channel scale [D] becomes
    [B, 1, D]. Both then broadcast against [B, N, D] as the model's own code expects.
    """

    def __init__(self, layout: Layout, token: bool) -> None:
        super().__init__()
        self.layout, self.token = layout, token

    def forward(self, value: Tensor) -> Tensor:
        per_head = value if self.token else value.unsqueeze(1)
        if not self.layout.active:
            return per_head[:1]
        return per_head.repeat_interleave(self.layout.samples_per_head, 0)

    def right_inverse(self, value: Tensor) -> Tensor:
        per_head = value if self.token else value.unsqueeze(0)
        return per_head.expand(self.layout.heads, *per_head.shape[1:]).clone()
