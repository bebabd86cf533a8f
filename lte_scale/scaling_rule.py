"""The scale and rates of the factors that follow from one learning rate, that of a dense AdamW: no search for alpha.

The question is what s makes a merge move W as far as AdamW at rate `lr` does in the same T steps. With reset, B starts
a window at zero and A_n has orthogonal rows of length sqrt(I / r), A A^T = (I / r) 1, so for one head

    |B A|^2 = tr(B A A^T B^T) = (I / r) |B|^2,   rms(B A)^2 = |B A|^2 / (O I) = |B|^2 / (O r) = rms(B)^2

whatever width and rank. AdamW takes no notice of a gradient's scale, so B's entries move as a dense weight's do, by
lr_B * k, with a k that depends on the betas, on T, and on how steady the gradient is. The gradient of a few images is
mostly noise, of its own in every head, and A_n differs too: deltas of heads are nearly orthogonal (cosine 0.04
measured, docs/LOG.md), and the mean of N is 1 / sqrt(N) of one. Hence rms((s / N) sum_n B_n A_n) = s lr_B k / sqrt(N):

    s = sqrt(N) * lr / lr_B

Only s * lr_B counts, so lr_B = lr. An entry of A is about 1 / sqrt(r) and a step changes it by lr_A; within a window it
must stay much what it was, or B A is more than what B has moved: lr_A = min(lr, DRIFT / (T sqrt(r))).

What it leaves out: the part of a change that windows have in common, along the mean gradient, is sqrt(r / I) of
AdamW's, since a head sees r of I directions; resetless factors, whose products grow past a window; the outer optimizer,
which multiplies what is merged by outer_lr / (1 - outer_momentum).
"""

from __future__ import annotations

import math

DRIFT = 0.25
"""How far A may move within a window, as a share of its size."""


def dense_equivalent_scale(heads: int) -> float:
    """s with which a merge of N heads, whose factors train at rate lr, moves a weight as AdamW at lr does."""
    return math.sqrt(heads)


def rate_of_a(lr: float, *, rank: int, window: int) -> float:
    """Learning rate of A, for windows of `window` steps between two merges of any kind."""
    return min(lr, DRIFT / (window * math.sqrt(rank)))
