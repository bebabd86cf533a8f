"""The arithmetic of an adapted layer, forward and backward, without a dense gradient or an activation summed twice.

Of the three products of a trained dense layer two are left, `x W^T` and `g W`. The low-rank part joins them in one of
two ways, whichever touches less memory: with many rows `W + B A` is formed for the moment of a product, and again for
that of the backward pass (nobody keeps it); with few rows `B (A x)` is added to what the product has written.

In bf16 a formed weight is rounded as the weight of any mixed-precision training is. A quantised weight is decoded just
before a product, in the forward pass and again in the backward pass, and dropped after it.

Shapes as in `adapters`: H heads, M rows per head, R rank, I in, O out; without H for one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.codec import Codec

_may_form = True


@contextmanager
def as_written() -> Iterator[None]:
    """The products of the equation, `W x` and `B (A x)`, whatever the number of rows: what FLOPs are counted of."""
    global _may_form
    _may_form = False
    try:
        yield
    finally:
        _may_form = True


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    A_HRI: Tensor,
    B_HOR: Tensor,
    bias_HO: Tensor | None = None,
    A_prev_HRI: Tensor | None = None,
    B_prev_HOR: Tensor | None = None,
    *,
    quantised: str = "",
) -> Tensor:
    """`y_n = W x_n + B_n A_n x_n + b_n - B'_n A'_n x_n`, all in one dtype; W, A' and B' are constants.

    Args:
        x: [*, I], head-major.
        weight: W [O, I], or its bytes [O, S] if `quantised` names the precision they are of (`codec`).

    Returns:
        y [*, O].
    """
    heads, into, out = len(A_HRI), x.shape[-1], len(weight)
    rows = x.numel() // into // heads
    formed = _may_form and rows * (out + into) > 2 * out * into
    factors = [A_HRI, B_HOR, bias_HO, A_prev_HRI, B_prev_HOR]
    if heads == 1:
        factors = [None if factor is None else factor[0] for factor in factors]
    x_HMI = x.reshape(-1, into) if heads == 1 else x.reshape(heads, -1, into)
    y_HMO: Tensor = _LowRankLinear.apply(x_HMI, weight, *factors, formed, quantised)
    # Not a view for autograd: models write in place on a layer's output, FSDP warns where one leaves the model.
    y: Tensor = torch.ops.aten._unsafe_view(y_HMO, [*x.shape[:-1], out])
    return y


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        A_prev: Tensor | None,
        B_prev: Tensor | None,
        formed: bool,
        quantised: str,
    ) -> Tensor:
        ctx.rank, ctx.formed, ctx.quantised = A.shape[-2], formed, quantised
        weight_OI = _dense(weight, x, quantised)
        if A_prev is not None and B_prev is not None:
            A, B = torch.cat((A, A_prev), -2), torch.cat((B, -B_prev), -1)
        h = None if formed else x @ A.mT
        y = _linear(x, _plus(weight_OI, B, A) if formed else weight_OI, bias)
        if h is not None:
            y = _plus(y, h, B.mT)
        ctx.save_for_backward(x, A, B, h)
        # Not saved: an engine may take the weight away in between, and checkpointing compares what is saved.
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        (g,), rank = gradients, ctx.rank
        gh = g @ (B[..., :rank] if ctx.formed else B)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_OI = _dense(ctx.weight, x, ctx.quantised)
            grad_x = g @ (_plus(weight_OI, B, A) if ctx.formed else weight_OI)
            grad_x = grad_x if ctx.formed else _plus(grad_x, gh, A)
        h = x @ A[..., :rank, :].mT if h is None else h[..., :rank]
        grad_bias = g.sum(-2) if ctx.needs_input_grad[4] else None
        return grad_x, None, gh[..., :rank].mT @ x, g.mT @ h, grad_bias, None, None, None, None


def _dense(weight: Tensor, x: Tensor, quantised: str) -> Tensor:
    """W [O, I] in the dtype of `x` [*, I]."""
    return Codec(quantised).decode(weight, x.shape[-1]).to(x.dtype) if quantised else weight


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    y = x @ weight.mT
    return y if bias is None else y.add_(bias.unsqueeze(1))


def _plus(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right` in one product's accumulation."""
    return torch.addmm(total, left, right) if left.dim() == 2 else torch.baddbmm(total, left, right)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
