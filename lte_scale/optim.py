"""The heads' optimizer: AdamW over stacked heads, clipped, skipped and restarted head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_scale.adam import build_adam, choose
from lte_scale.averaging import GradientAverage
from lte_scale.collectives import Collectives
from lte_scale.config.schema import OptimizerConfig
from lte_scale.model import Heads
from lte_scale.moments import HeldMoments


class LateFlags:
    """Flags of the device, read on the host one call later, when they have long arrived; on a CPU at once."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None
        self.held = torch.zeros(count, dtype=torch.bool, pin_memory=self.arrived is not None)

    def exchange(self, flags: Tensor) -> list[bool]:
        """Hand over flags [count]; returns those of the call before."""
        if self.arrived is None:
            return list(flags.tolist())
        self.arrived.synchronize()
        before: list[bool] = self.held.tolist()
        self.held.copy_(flags, non_blocking=True)
        self.arrived.record()
        return before


class HeadOptimizer:
    """Steps the factors and replica parameters of the heads of this process.

    AdamW is elementwise, so stepping [H, ...] tensors is stepping H heads. The norm of a head's gradient is taken
    over all its tensors. A head whose loss or gradient is not finite keeps parameters and moments as they were.

    Attributes:
        skipped_in_a_row: for each head, steps skipped since its last good one.
    """

    def __init__(
        self,
        heads: Heads,
        config: OptimizerConfig,
        collectives: Collectives,
        *,
        lr_of_a: float | None = None,
        passes: int = 1,
    ) -> None:
        """
        Args:
            lr_of_a: the peak rate of A, if it is not that of B.
            passes: backward passes of a step.
        """
        self.heads, self.config, self.collectives = heads, config, collectives
        self.parameters: dict[str, nn.Parameter] = heads.parameters()
        device = next(iter(self.parameters.values())).device
        name = choose(config.name, device)
        if config.name == "auto":  # packages may differ between ranks, and ranks that share a head step it alike
            name = collectives.broadcast_object(name)
        layers, dense = heads.linears.values(), heads.dense_weights()
        groups: list[dict[str, Any]] = [  # what restarts together is one group
            {
                "params": [layer.A for layer in layers],
                "peak": lr_of_a or config.lr,
                "weight_decay": config.weight_decay,
            },
            {"params": [layer.B for layer in layers], "peak": config.lr, "weight_decay": config.weight_decay},
            {"params": list(dense.values()), "peak": config.lr, "weight_decay": config.weight_decay},
            {
                "params": [p for name, p in heads.replicas.items() if name not in dense],
                "peak": config.replica_lr,
                "weight_decay": 0.0,
            },
        ]
        self.adam = build_adam(name, groups, betas=(config.beta1, config.beta2), eps=config.eps, device=device)
        self.held = HeldMoments(self.adam, config.moments, len(heads.ids)) if config.moments != "fp32" else None
        group = collectives.world if config.average == "all" else collectives.head
        self.average: GradientAverage | None = None
        if group.size > 1:
            backward = {name: self.parameters[name] for name in reversed(heads.order)}
            self.average = GradientAverage(backward, collectives, group, passes=passes)
        self.fused = name == "adamw" and len(heads.ids) == 1
        self.flags = LateFlags(len(heads.ids), device)
        self.skipped_in_a_row = [0] * len(heads.ids)

    def without_gradient(self) -> list[str]:
        """Names of parameters that the backward passes of a step have not reached; to be asked before it is taken."""
        if self.average:
            return self.average.without_gradient()
        return [name for name, parameter in self.parameters.items() if parameter.grad is None]

    def step(self, losses: Tensor, rate: Callable[[float], float] = lambda peak: peak) -> tuple[Tensor, list[bool]]:
        """Average gradients over the ranks that share a head, or over all; clip, step every head that is finite, clear.

        Args:
            losses: mean loss of every head [H].
            rate: the learning rate from its peak.

        Returns:
            The norm of every head's gradient [H], and for every head whether it was skipped; with one head on CUDA
            whether it was in the step before, so that the host need not wait for the device.
        """
        if self.average:
            self.average.finish()
        norms = self._gradient_norms()
        finite = (losses.isfinite() & norms.isfinite()).to(norms.device)
        for group in self.adam.param_groups:
            group["lr"] = rate(group["peak"])
        with self.decoded():
            skipped = self._step_fused(norms, finite) if self.fused else self._step_any(norms, finite)
        if self.average:
            self.average.clear()
        else:
            self.adam.zero_grad()
        self.skipped_in_a_row = [n + 1 if bad else 0 for n, bad in zip(self.skipped_in_a_row, skipped, strict=True)]
        return norms, skipped

    def _step_fused(self, norms: Tensor, finite: Tensor) -> list[bool]:
        """One head: torch's own kernel clips, and skips where the gradient is not finite; nobody waits to know."""
        adam: Any = self.adam  # the protocol of torch.amp.GradScaler
        adam.grad_scale = self._clip_factors(norms).reciprocal().squeeze()
        adam.found_inf = (~finite).float().squeeze()
        adam.step()
        return self.flags.exchange(~finite)

    def _step_any(self, norms: Tensor, finite: Tensor) -> list[bool]:
        skipped: list[bool] = (~finite).tolist()
        self._scale_gradients(norms, finite, any(skipped))
        kept = self._slices([index for index, bad in enumerate(skipped) if bad])
        self.adam.step()
        for view, index, value in kept:
            view[index].copy_(value)
        return skipped

    def _gradient_norms(self) -> Tensor:
        count = len(self.heads.ids)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if count == 1:
            return torch.nn.utils.get_total_norm(gradients).view(1)
        norms = [torch.linalg.vector_norm(gradient.view(count, -1), dim=1) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _clip_factors(self, norms: Tensor) -> Tensor:
        clip = self.config.clip_norm
        return (clip / (norms + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norms)

    def _scale_gradients(self, norms: Tensor, finite: Tensor, any_skipped: bool) -> None:
        factors = self._clip_factors(norms)
        for parameter in self.parameters.values():
            gradient = parameter.grad
            if gradient is None:
                continue
            per_head = gradient.view(len(self.heads.ids), -1)
            if any_skipped:
                per_head.masked_fill_(~finite.unsqueeze(1), 0.0)
            per_head.mul_(torch.where(finite, factors, 0.0).unsqueeze(1))

    @torch.no_grad()
    def _slices(self, indices: list[int]) -> list[tuple[Tensor, int, Tensor]]:
        """Copies of everything these heads' step would change: (per-head view, index, value)."""
        kept = []
        for parameter in self.parameters.values() if indices else ():
            tensors = [parameter.detach(), *self.moments(parameter).values()]
            views = [t.view(len(self.heads.ids), -1) for t in tensors]
            kept += [(view, index, view[index].clone()) for view in views for index in indices]
        return kept

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """Within, all moments are there in fp32, to be read and written."""
        if self.held is None:
            yield
        else:
            with self.held.decoded():
                yield

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's `exp_avg` and `exp_avg_sq` of a parameter, `decoded`."""
        state = self.adam.state[parameter]
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    @torch.no_grad()
    def start_again(self, index: int) -> None:
        """The head at `index` has been withdrawn. Its second moments stay: without them its first steps were larger."""
        with self.decoded():
            for parameter in self.parameters.values():
                self.moments(parameter)["exp_avg"].view(len(self.heads.ids), -1)[index].zero_()
        self.skipped_in_a_row[index] = 0

    @torch.no_grad()
    def restart(self, policy: str) -> None:
        """After a merge. `keep` leaves the state, `reset` clears it all, `reset_b` that of B alone."""
        if policy == "keep":
            return
        chosen = self.heads.factor_parameters() if policy == "reset_b" else self.parameters
        with self.decoded():
            for name, parameter in chosen.items():
                if policy == "reset" or name.endswith(".B"):
                    for moment in self.moments(parameter).values():
                        moment.zero_()
                    self.adam.state[parameter]["step"].zero_()
