"""Heads that have lost their way: left out of the merge, and started again from the base.

Heads start every window from the same weights, so a head that learns at all ends it near the loss it had at the merge
before. One whose loss has multiplied would carry its damage to all others by the mean; without it the others lose its
share of a window, N - 1 heads in place of N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_scale.collectives import Collectives
from lte_scale.merge import Merger
from lte_scale.optim import HeadOptimizer

_HORIZON = 8  # steps that the mean of losses goes back
_FLOOR = 0.25  # of the loss at chance: below that, batches differ by more than heads do
_SKIPPED = 2  # steps in a row without a finite gradient, up to a merge
_HOPELESS = 6  # strikes: a withdrawal is two, a merge that the head takes part in takes one away


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A head that has started again. `hopeless` if it has done little else for some windows."""

    head: int
    reason: str
    hopeless: bool


class Divergence:
    """Follows the losses of the heads of this process, and withdraws those that diverge.

    Attributes:
        recent: moving mean of every head's finite losses [H].
        merged: what that was at the last merge that the head took part in [H].
        strikes: how often every head was withdrawn lately [H], see `_HOPELESS`.
    """

    def __init__(
        self,
        merger: Merger,
        optimizer: HeadOptimizer,
        collectives: Collectives,
        *,
        ratio: float,
        classes: int,
        device: torch.device,
    ) -> None:
        """`ratio`: of losses, above which a head has diverged; 0 withdraws none."""
        self.merger, self.optimizer, self.collectives, self.ratio = merger, optimizer, collectives, ratio
        self.ids = merger.heads.ids
        at_chance = math.log(max(2, classes))
        self.floor = _FLOOR * at_chance
        self.recent = torch.full((len(self.ids),), at_chance, device=device)
        self.merged = self.recent.clone()
        self.strikes = torch.zeros(len(self.ids), dtype=torch.int64)

    def follow(self, losses: Tensor) -> None:
        """After a step with these mean losses of the heads [H]."""
        if self.ratio:
            self.recent.lerp_(losses.where(losses.isfinite(), self.recent), 1 / _HORIZON)

    def before_merge(self, step: int) -> list[Withdrawal]:
        """Withdraw the heads that have diverged since the last merge. Collective over the ranks that share a head."""
        if not self.ratio:
            return []
        skipped = torch.tensor(self.optimizer.skipped_in_a_row, dtype=torch.float32, device=self.recent.device)
        seen = torch.stack((self.recent, skipped))
        if self.collectives.head.size > 1:
            seen = self.collectives.all_reduce(seen, self.collectives.head, "control") / self.collectives.head.size
        found = []
        for index, (loss, skips, before) in enumerate(zip(*seen.tolist(), self.merged.tolist(), strict=True)):
            if skips >= _SKIPPED:
                found.append(self.withdraw(index, step, "its loss or gradient is not finite"))
            elif loss > self.ratio * max(before, self.floor):
                found.append(self.withdraw(index, step, f"its loss is {loss:.3g}, at the merge before {before:.3g}"))
            else:
                self.strikes[index] = max(0, int(self.strikes[index]) - 1)
                self.merged[index] = self.recent[index]
        return found

    def withdraw(self, index: int, step: int, reason: str) -> Withdrawal:
        """The head at `index` starts again from the base, by the same draw on all ranks that share it."""
        self.merger.withdraw(index, step)
        self.optimizer.start_again(index)
        self.recent[index] = self.merged[index]
        self.strikes[index] += 2
        return Withdrawal(self.ids[index], reason, hopeless=int(self.strikes[index]) >= _HOPELESS)
