"""LTE by its equations in one unsharded process: every head its own model, every delta formed in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_scale.arrangement import Arrangement
from lte_scale.codec import Codec
from lte_scale.config.schema import Config, ModelConfig
from lte_scale.cost import shapes_of
from lte_scale.initial import base_slice
from lte_scale.model import Heads, attach, build
from lte_scale.topology import Topology

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
    """`nodes` x `heads_per_node` heads trained one after another.

    With a quantised base they compute with what it decodes to, held as plain weights.
    """

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
        self.node_weights = [{n: w.clone() for n, w in self.masters.items()} for _ in range(nodes)]
        self.held = Codec(config.base.precision if config.base.quantised else "fp32")
        self._write_weights()
        shapes = Arrangement(shapes_of(self.heads[0]), Topology(nodes=nodes), config)
        self.cadence, self.fragment_of = shapes.cadence, shapes.fragment_of
        self.under_way: dict[str, Tensor] = {}
        self.left: list[dict[str, Tensor]] = []

    def _write_weights(self) -> None:
        for head, heads in enumerate(self.heads):
            for name, layer in heads.linears.items():
                weight = self.held.rounded(self.node_weights[head // self.heads_per_node][name])
                layer.base.weight = nn.Parameter(weight, requires_grad=False)

    def run(self, steps: int, batches: Callable[[int, int], Batch], *, whole: bool = False) -> None:
        """`whole`: the last step ends the run."""
        for step in range(1, steps + 1):
            for head in range(len(self.models)):
                self._step(head, *batches(step, head))
            if self.cadence.due(step):
                self._merge(step, last=whole and step == steps)

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

    def _of_node(self, node: int) -> range:
        return range(node * self.heads_per_node, (node + 1) * self.heads_per_node)

    @torch.no_grad()
    def _merge(self, step: int, *, last: bool) -> None:
        """Inside the nodes; what departs is the mean over them, which lands at once or `delay` steps later."""
        landing = self.cadence.lands(step) if self.cadence.takes_time(step) else None
        if landing is not None:
            self._land(landing)
        departing, local = self.cadence.sets_sent(step, last=last), self.cadence.is_local(step)
        names = [name for name, fragment in self.fragment_of.items() if local or fragment in departing]
        for node, weights in enumerate(self.node_weights):
            for name in names:
                weights[name].add_(torch.stack([self._delta(h, name) for h in self._of_node(node)]).mean(0).float())
        for heads in self.heads:
            for layer in (heads.linears[name] for name in names):
                if layer.A_prev is None or layer.B_prev is None:
                    layer.B.zero_()
                else:
                    layer.A_prev.copy_(layer.A)
                    layer.B_prev.copy_(layer.B)
        if local or 0 in departing:
            self._mean_of_replicas()
        if self.cadence.is_regional(step):
            self._merge_in_regions({name for name in names if self.fragment_of[name] not in departing})
            if 0 not in departing:
                self._mean_of_replicas(nodes=self.config.topology.nodes_per_region)
        self.under_way = {n: torch.stack([w[n] for w in self.node_weights]).mean(0) for n in names}
        if last or not self.cadence.takes_time(step):
            for fragment in departing:
                self._land(fragment)
        self._write_weights()
        self._restart_optimizers()

    def _merge_in_regions(self, names: set[str]) -> None:
        size = self.config.topology.nodes_per_region
        for first in range(0, self.nodes, size):
            region = self.node_weights[first : first + size]
            for name in names:
                mean = torch.stack([weights[name] for weights in region]).mean(0)
                for weights in region:
                    weights[name].copy_(mean)

    def _mean_of_replicas(self, nodes: int = 1) -> None:
        """The heads of a node (or of so many neighbours) continue from their mean, which may depart."""
        self.left = []
        for node in range(self.nodes):
            first = node - node % nodes
            ids = range(self._of_node(first).start, self._of_node(first + nodes - 1).stop)
            means = {n: torch.stack([self.heads[h].replicas[n] for h in ids]).mean(0) for n in self.replica_masters}
            for head in ids:
                for name, parameter in self.heads[head].replicas.items():
                    parameter.copy_(means[name])
            self.left.append(means)

    def _land(self, fragment: int) -> None:
        for name in (name for name, of in self.fragment_of.items() if of == fragment):
            self._outer(self.masters, name, self.under_way[name])
            for weights in self.node_weights:
                weights[name].copy_(self.masters[name])
        if fragment:
            return
        for name, master in self.replica_masters.items():
            self._outer(self.replica_masters, name, torch.stack([left[name] for left in self.left]).mean(0))
            for head, heads in enumerate(self.heads):
                heads.replicas[name].add_(master - self.left[head // self.heads_per_node][name])

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
