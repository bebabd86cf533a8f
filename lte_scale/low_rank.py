"""The arithmetic of an adapted layer, forward and backward, without a dense gradient, a delta or a copy of the weight.

Of the three products of a trained dense layer two are left, `x W^T` and `g W`. The low-rank part meets them
inside the products' own accumulation, so no sum of two activations is formed; and what the backward pass needs of it
is `x`, which the dense part needs as well, and `h = x A^T` [H, M, R].

Shapes as in `adapters`: H heads, M rows per head, R rank, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LowRankLinear(torch.autograd.Function):
    """`y_n = W x_n + B_n A_n x_n + b_n - B'_n A'_n x_n`, all in one dtype; W, A' and B' are constants.

    Args: x [*, I] (head-major, * = H M), W [O, I], A [H, R, I], B [H, O, R], b [H, O] or None, A' and B' as A and B or
    None. Returns y [*, O]. The scale is the caller's: a factor of A and of A'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        A_HRI: Tensor,
        B_HOR: Tensor,
        bias_HO: Tensor | None,
        A_prev_HRI: Tensor | None,
        B_prev_HOR: Tensor | None,
    ) -> Tensor:
        ctx.rank = A_HRI.shape[1]
        if A_prev_HRI is not None and B_prev_HOR is not None:
            A_HRI, B_HOR = torch.cat((A_HRI, A_prev_HRI), 1), torch.cat((B_HOR, -B_prev_HOR), 2)
        x_HMI = x.reshape(len(A_HRI), -1, x.shape[-1])
        h_HMR = _product(x_HMI, A_HRI.mT)
        y = x.new_empty(*x.shape[:-1], len(weight_OI))
        y_HMO = y.view(*h_HMR.shape[:2], -1)
        if len(A_HRI) == 1:
            _product(x_HMI, weight_OI.mT, out=y_HMO, plus=bias_HO)
            _product(h_HMR, B_HOR.mT, out=y_HMO, plus=y_HMO)
        else:  # the small products take a bias per head with them, and the large one, of all heads, adds to it
            _product(h_HMR, B_HOR.mT, out=y_HMO, plus=bias_HO)
            _product(x_HMI, weight_OI.mT, out=y_HMO, plus=y_HMO)
        ctx.save_for_backward(x_HMI, weight_OI, A_HRI, B_HOR, h_HMR)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_HMI, weight_OI, A_HRI, B_HOR, h_HMR = ctx.saved_tensors
        (gradient,), rank = gradients, ctx.rank
        g_HMO = gradient.reshape(*x_HMI.shape[:2], -1)
        gh_HMR = _product(g_HMO, B_HOR)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g_HMO.new_empty(*gradient.shape[:-1], x_HMI.shape[-1])
            gx_HMI = grad_x.view(x_HMI.shape)
            _product(g_HMO, weight_OI, out=gx_HMI)
            _product(gh_HMR, A_HRI, out=gx_HMI, plus=gx_HMI)
        grad_A_HRI = _product(gh_HMR[..., :rank].mT, x_HMI)
        grad_B_HOR = _product(g_HMO.mT, h_HMR[..., :rank])
        return grad_x, None, grad_A_HRI, grad_B_HOR, g_HMO.sum(1) if ctx.needs_input_grad[4] else None, None, None


def _product(left: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`left @ right + plus` of [H, ., .] each; `right` may be one matrix for all, `plus` [H, columns] one row per head.

    One matrix product, or a batched one: of a batch of one the plain kernels are faster.
    """
    if right.dim() == 2 or len(left) == 1:
        flat = left.reshape(-1, left.shape[-1])
        target = None if out is None else out.view(-1, out.shape[-1])
        matrix = right if right.dim() == 2 else right[0]
        if plus is None:
            result = torch.mm(flat, matrix, out=target)
        else:
            result = torch.addmm(plus[0] if plus.dim() == 2 else plus.view(-1, plus.shape[-1]), flat, matrix, out=target)
        return result.view(*left.shape[:-1], -1) if out is None else out
    if plus is None:
        return torch.bmm(left, right, out=out)
    return torch.baddbmm(plus.unsqueeze(1) if plus.dim() == 2 else plus, left, right, out=out)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
