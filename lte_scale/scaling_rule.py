"""The scale and rates of the factors that follow from one learning rate, that of a dense AdamW: no search for alpha.

The question is what s makes N heads, merged, move W as AdamW at rate `lr` would on the same samples. Let G [O, I] be
the mean gradient, and a head's own gradient G plus noise that is much larger, as with the few images of a step.

    AdamW on the N heads' samples    moves an entry by lr * k * sqrt(N) * G / rms(noise): averaging N heads' samples
                                     makes the noise smaller by sqrt(N), and Adam divides by it. k depends on the
                                     betas and the number of steps, and is the same below.
    B_n of one head                  has the gradient s G_n A_n^T, of one head's noise, so it moves by
                                     lr_B * k * G A_n^T / rms(noise A_n^T). A_n has orthogonal rows of length
                                     sqrt(I / r), so that is lr_B * k * sqrt(r / I) * G A_n^T / rms(noise).
    (s / N) sum_n B_n A_n            moves by s * lr_B * k * sqrt(r / I) * G * mean_n(A_n^T A_n) / rms(noise), and over
                                     heads (or windows, where A is drawn anew) the mean of A^T A is the identity.

The two are equal for

    s = (lr / lr_B) * sqrt(N * I / r)

with I and r those of the layer. Only s * lr_B counts, since AdamW takes no notice of a gradient's scale: lr_B = lr.
An entry of A is about 1 / sqrt(r), and a step changes it by lr_A; within a window of T steps A must stay much what it
was, or B's steps, which suit the A of their time, no longer add up. Hence lr_A = min(lr, DRIFT / (T sqrt(r))).

What it leaves out: the noise that heads add besides, sqrt(I / r) times that of a dense step; resetless factors, whose
products grow past a window; the outer optimizer, which multiplies what is merged by outer_lr / (1 - outer_momentum).
"""

from __future__ import annotations

import math

DRIFT = 0.25
"""How far A may move within a window, as a share of its size."""


def dense_equivalent_scale(*, heads: int, rank: int, into: int) -> float:
    """s of a layer whose factors have rank `rank` (at most `into`), so that their rate is a dense AdamW's.

    Args:
        heads: of the whole run, N.
        into: input features of the layer, I.
    """
    return math.sqrt(heads * into / rank)


def rate_of_a(lr: float, *, rank: int, window: int) -> float:
    """Learning rate of A, for windows of `window` steps between two merges of any kind."""
    return min(lr, DRIFT / (window * math.sqrt(rank)))
