"""LTE by its equations in one unsharded process: every head its own model, every delta formed in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_scale.config.schema import Config, ModelConfig
from lte_scale.initial import base_slice
from lte_scale.model import Heads, attach, build

TINY = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=28,
    channels=1,
    arguments={"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 1, "init_values": 0.1},
)
CLASSES = 7  # rows that no number of ranks divides: shards are uneven

Batch = tuple[Tensor, Tensor]


def head_batch(step: int, head: int, size: int) -> Batch:
    """The same data wherever a head lives."""
    generator = torch.Generator().manual_seed(1000 * step + head)
    return (
        torch.randn(size, 1, 28, 28, generator=generator),
        torch.randint(0, CLASSES, (size,), generator=generator),
    )


class Reference:
    """`nodes` x `heads_per_node` heads trained one after another."""

    def __init__(self, config: Config, nodes: int, heads_per_node: int) -> None:
        self.config, self.nodes, self.heads_per_node = config, nodes, heads_per_node
        self.models: list[nn.Module] = []
        self.heads: list[Heads] = []
        self.optimizers: list[torch.optim.AdamW] = []
        for head in range(nodes * heads_per_node):
            model = build(config.model, CLASSES, seed=config.seed)
            heads = attach(model, config.adapters, range(head, head + 1), seed=config.seed)
            o = config.optimizer
            groups = [
                {"params": list(heads.factor_parameters().values()), "lr": o.lr, "weight_decay": o.weight_decay},
                {"params": list(heads.replicas.values()), "lr": o.replica_lr, "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, foreach=False)
            self.models.append(model)
            self.heads.append(heads)
            self.optimizers.append(adamw)
        self.masters: dict[str, Tensor] = {}
        for name, layer in self.heads[0].linears.items():
            shape = (layer.B.shape[1], layer.A.shape[2])
            flat = base_slice(name, shape, 0, shape[0] * shape[1], std=layer.initial_std, seed=config.seed)
            self.masters[name] = flat.view(shape)
        self.replica_masters = {name: p.detach().clone() for name, p in self.heads[0].replicas.items()}
        self.momenta: dict[str, Tensor] = {}
        self._start_windows()

    def _start_windows(self) -> None:
        self.node_weights = [{n: w.clone() for n, w in self.masters.items()} for _ in range(self.nodes)]
        self._write_weights()

    def _write_weights(self) -> None:
        for head, heads in enumerate(self.heads):
            for name, layer in heads.linears.items():
                layer.base.weight = nn.Parameter(
                    self.node_weights[head // self.heads_per_node][name], requires_grad=False
                )

    def run(self, steps: int, batches: Callable[[int, int], Batch]) -> None:
        merge = self.config.merge
        for step in range(1, steps + 1):
            for head in range(len(self.models)):
                self._step(head, *batches(step, head))
            if step % (merge.local_every or merge.every) == 0:
                self._merge(step % merge.every == 0)

    def _step(self, head: int, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(self.models[head](images), labels).backward()
        parameters = list(self.heads[head].parameters().values())
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip_norm)
        self.optimizers[head].step()
        self.optimizers[head].zero_grad()

    def _delta(self, head: int, name: str) -> Tensor:
        """s (B A - B' A') in float64, in full."""
        layer = self.heads[head].linears[name]
        delta = layer.B[0].double() @ layer.A[0].double()
        if layer.A_prev is not None and layer.B_prev is not None:
            delta = delta - layer.B_prev[0].double() @ layer.A_prev[0].double()
        return layer.scale * delta

    @torch.no_grad()
    def _merge(self, everywhere: bool) -> None:
        per_node = [range(k * self.heads_per_node, (k + 1) * self.heads_per_node) for k in range(self.nodes)]
        for node, ids in enumerate(per_node):
            for name, weight in self.node_weights[node].items():
                weight.add_(torch.stack([self._delta(h, name) for h in ids]).mean(0).float())
        groups = [range(len(self.heads))] if everywhere else per_node
        means = [
            {n: torch.stack([self.heads[h].replicas[n] for h in ids]).mean(0) for n in self.replica_masters}
            for ids in groups
        ]
        if everywhere:
            for name in self.masters:
                mean = torch.stack([w[name] for w in self.node_weights]).mean(0)
                self._outer(self.masters, name, mean)
            for name in self.replica_masters:
                self._outer(self.replica_masters, name, means[0][name])
            means = [self.replica_masters]
            self._start_windows()
        for values, ids in zip(means, groups, strict=True):
            for head in ids:
                for name, parameter in self.heads[head].replicas.items():
                    parameter.copy_(values[name])
        for heads in self.heads:
            for layer in heads.linears.values():
                if layer.A_prev is None or layer.B_prev is None:
                    layer.B.zero_()
                else:
                    layer.A_prev.copy_(layer.A)
                    layer.B_prev.copy_(layer.B)
        self._restart_optimizers()

    def _outer(self, masters: dict[str, Tensor], name: str, mean: Tensor) -> None:
        merge = self.config.merge
        if merge.outer == "average":
            masters[name].copy_(mean)
            return
        gradient = masters[name] - mean
        momentum = self.momenta.setdefault(name, torch.zeros_like(mean)).mul_(merge.outer_momentum).add_(gradient)
        masters[name].sub_(merge.outer_lr * (gradient + merge.outer_momentum * momentum))

    def _restart_optimizers(self) -> None:
        policy = self.config.merge.optimizer_state
        for heads, adamw in zip(self.heads, self.optimizers, strict=True):
            for name, parameter in heads.parameters().items():
                if policy == "reset" or (
                    policy == "reset_b" and name in heads.factor_parameters() and name[-2:] == ".B"
                ):
                    adamw.state.pop(parameter, None)


def with_mode(config: Config, mode: str) -> Config:
    return replace(config, adapters=replace(config.adapters, mode=mode))
