"""The outer optimizer: what a window's mean change does to the master."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_scale.config.schema import MergeConfig


class Outer:
    """Masters with their momentum and moving average, each tensor the part this rank owns.

    `average` adds the mean change, as the LTE paper does. `nesterov` takes its negative as a gradient for SGD with
    Nesterov momentum, as DiLoCo does (arXiv 2311.08105, algorithm 1).
    """

    def __init__(self, config: MergeConfig, ema_decay: float) -> None:
        self.config, self.ema_decay = config, ema_decay
        self.masters: dict[str, Tensor] = {}
        self.momenta: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}

    def start_average(self) -> None:
        """Begin the moving average (if any) and the momentum at the present masters."""
        if self.ema_decay:
            self.averages = {name: master.clone() for name, master in self.masters.items()}
        if self.config.outer == "nesterov":
            self.momenta = {name: torch.zeros_like(master) for name, master in self.masters.items()}

    def update(self, name: str, change: Tensor, decay: float) -> None:
        """Apply the mean change of a window [elements owned] to master `name`, in place, after decoupled decay."""
        master = self.masters[name]
        change = change.to(master.device)  # an offloaded master is in CPU memory
        if decay:
            master.mul_(1 - decay)
        if self.config.outer == "average":
            master.add_(change)
        else:
            momentum = self.momenta[name].mul_(self.config.outer_momentum).add_(change)
            master.add_(change + self.config.outer_momentum * momentum, alpha=self.config.outer_lr)
        if self.ema_decay:
            self.averages[name].lerp_(master, 1 - self.ema_decay)
