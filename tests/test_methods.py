"""The baselines against their papers' equations on timm's own model, and the rule that gives factors their scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_scale.config.checks import check, check_topology
from lte_scale.config.methods import translated
from lte_scale.config.schema import (
    AdaptersConfig,
    BaseConfig,
    Config,
    ConfigError,
    EngineConfig,
    MergeConfig,
    OptimizerConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.estimate import make_plan
from lte_scale.initial import orthogonal_factor, seed_of
from lte_scale.model import attach, build
from lte_scale.scaling_rule import DRIFT, dense_equivalent_scale, rate_of_a
from lte_scale.schedules import rewarmed
from lte_scale.traffic import by_scope
from tests.dist.equality import BATCH, Run
from tests.reference import CLASSES, TINY, head_batch

STEPS, EVERY, LR = 6, 2, 3e-3


def configuration(method: str, heads: int = 1, **merge: object) -> Config:
    config = Config(
        method=method,
        model=TINY,
        adapters=AdaptersConfig(rank=3, alpha=6),
        topology=TopologyConfig(heads_per_node=heads),
        engine=EngineConfig(name="none"),
        train=TrainConfig(precision="fp32"),
        merge=MergeConfig(every=EVERY, **merge),  # type: ignore[arg-type]
        # The key biases' gradient is zero but for rounding, which Adam would blow up to full steps.
        optimizer=OptimizerConfig(lr=LR, replica_lr=LR, eps=1e-3, clip_norm=0),
    )
    return translated(config)


def trained(config: Config) -> Run:
    run = Run(config)
    for step in range(1, STEPS + 1):
        run.step(step)
    return run


def dense_model() -> nn.Module:
    """timm's own, with the weights that every method starts from."""
    heads = attach(model := build(TINY, CLASSES, seed=0), AdaptersConfig(dense=["*"]), range(1), seed=0)
    plain = build(TINY, CLASSES, seed=0)
    values = {name: p.detach().view(heads.replica_shapes[name]) for name, p in heads.replicas.items()}
    buffers = dict(model.named_buffers())
    plain.load_state_dict({**values, **buffers}, assign=True)
    return plain.requires_grad_(True)


def adamw(parameters: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, eps=1e-3, weight_decay=0.0)  # type: ignore[arg-type]


def assert_masters(run: Run, wanted: Callable[[str], Tensor]) -> None:
    """Every weight of the merged model."""
    for masters in (run.merger.outer.masters, run.merger.replicas.outer.masters):
        for name, value in masters.items():
            key = name if name in run.heads.replicas else f"{name}.weight"
            expected = wanted(key).flatten()
            torch.testing.assert_close(value.flatten(), expected, rtol=2e-4, atol=2e-6, msg=key)


def loss_of(model: nn.Module, step: int, head: int = 0) -> Tensor:
    images, labels = head_batch(step, head, BATCH)
    return F.cross_entropy(model(images), labels)


def test_full_is_adamw_on_every_weight() -> None:
    model = dense_model()
    optimizer = adamw(model.parameters())
    for step in range(1, STEPS + 1):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = trained(configuration("full"))
    assert not run.heads.linears
    assert_masters(run, dict(model.named_parameters()).__getitem__)


def test_diloco_is_its_algorithm() -> None:
    """arXiv 2311.08105, algorithm 1: the outer gradient is the mean of theta - theta_i, stepped by Nesterov's SGD."""
    heads = 3
    shared = dense_model()
    models = [dense_model() for _ in range(heads)]
    inner = [adamw(model.parameters()) for model in models]
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for step in range(1, STEPS + 1):
        for head, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            loss_of(model, step, head).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            copies = zip(*(model.parameters() for model in models), strict=True)
            for theta, mine in zip(shared.parameters(), copies, strict=True):
                theta.grad = torch.stack([theta.detach() - p.detach() for p in mine]).mean(0)
            outer.step()
            for model in models:
                model.load_state_dict(shared.state_dict())
    run = trained(configuration("diloco", heads, outer_lr=0.7, outer_momentum=0.9))
    assert_masters(run, dict(shared.named_parameters()).__getitem__)


class Adapted:
    """A model whose linear layers are W + s B A, W frozen: A and B plain tensors, the product formed in full."""

    def __init__(self) -> None:
        self.model = dense_model()
        heads = attach(build(TINY, CLASSES, seed=0), AdaptersConfig(rank=3, alpha=6), range(1), seed=0)
        self.W = {n: self.model.get_parameter(f"{n}.weight").detach().clone() for n in heads.linears}
        self.shapes = {n: layer.A[0].shape for n, layer in heads.linears.items()}
        self.others = {n: p for n, p in self.model.named_parameters() if n in heads.replicas}
        self.begin(seed=0)

    def begin(self, seed: int) -> None:
        """New factors and a new optimizer."""
        self.A = {n: orthogonal_factor(n, s[0], s[1], 0, seed=seed).requires_grad_() for n, s in self.shapes.items()}
        self.B = {n: torch.zeros(len(w), 3, requires_grad=True) for n, w in self.W.items()}
        self.optimizer = adamw([*self.A.values(), *self.B.values(), *self.others.values()])

    def weight(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        if name not in self.W:
            return self.others[key]
        return self.W[name] + (2.0 * self.B[name] @ self.A[name]).view_as(self.W[name])

    def step(self, step: int) -> None:
        images, labels = head_batch(step, 0, BATCH)
        weights = {f"{name}.weight": self.weight(name) for name in self.W}
        logits = torch.func.functional_call(self.model, {**self.others, **weights}, (images,))
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_lora_is_never_merged() -> None:
    wanted = Adapted()
    for step in range(1, STEPS + 1):
        wanted.step(step)
    assert_masters(trained(configuration("lora")), wanted.weight)


def test_relora_merges_and_begins_anew() -> None:
    """arXiv 2307.05695, algorithm 1, at a constant rate: W <- W + s B A, A drawn, B zero, no optimizer state."""
    wanted = Adapted()
    for step in range(1, STEPS + 1):
        wanted.step(step)
        if step % EVERY == 0:
            wanted.W = {name: wanted.weight(name).detach() for name in wanted.W}
            wanted.begin(seed=seed_of(0, step))
    assert_masters(trained(configuration("relora")), wanted.weight)


def test_relora_warms_up_again_after_every_merge() -> None:
    factors = [rewarmed(step, window=10, share=0.3) for step in range(1, 25)]
    assert factors[:10] == [1.0] * 10
    assert factors[10:14] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert factors[20] == pytest.approx(1 / 3)
    assert {rewarmed(step, window=10, share=0.0) for step in range(1, 25)} == {1.0}


@pytest.mark.parametrize("method", ["full", "diloco"])
def test_plan_of_dense_methods(method: str) -> None:
    config = replace(configuration(method), model=replace(TINY, num_classes=CLASSES), engine=EngineConfig())
    plan = make_plan(config, nodes=2, ranks_per_node=1)
    assert plan.flops == plan.full_rank_flops
    assert by_scope(plan.gather)["inter_node"] == 0
    assert (by_scope(plan.step)["inter_node"] > 0) == (method == "full")


@pytest.mark.parametrize("method", ["lte", "full", "diloco", "lora", "relora"])
def test_a_method_is_translated_once(method: str) -> None:
    config = configuration(method)
    check(config)
    assert translated(config) == config


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (configuration("full", outer="nesterov"), "merge.outer"),
        (configuration("full", local_every=1), "merge.local_every"),
        (configuration("lora", delay=1), "merge.delay"),
        (configuration("diloco", fragments=2), "merge.fragments"),
        (translated(Config(method="diloco", base=BaseConfig(scope="global"))), "base.scope"),
        (translated(Config(method="full", engine=EngineConfig(name="deepspeed"))), "engine.name"),
        (
            translated(Config(method="diloco", adapters=AdaptersConfig(rank_by_layer={"*": 2}))),
            "adapters.rank_by_layer",
        ),
        (Config(adapters=AdaptersConfig(redraw=True, mode="resetless")), "adapters.redraw"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_meaning_is_refused(config: Config, key: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        check(config)
    assert "leave it out" in str(error.value)


def test_one_head_cannot_be_many_in_a_process() -> None:
    with pytest.raises(ConfigError, match=r"heads_per_node: 4 on 1 ranks.*train.batch_size=512"):
        check_topology(configuration("full", 4), nodes=1, ranks_per_node=1)


SNR, LEARNING_RATE = 0.05, 1e-3  # of a step of all heads: mostly noise


def moved(
    parameters: dict[str, Tensor], gradients: Callable[[], dict[str, Tensor]], window: int, lr_of_a: float
) -> None:
    """AdamW for a window, in place."""
    groups = [{"params": [p], "lr": lr_of_a if name == "A" else LEARNING_RATE} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(window):
        for name, gradient in gradients().items():
            parameters[name].grad = gradient
        optimizer.step()


def change_by_adamw(signal: Tensor, heads: int, window: int, g: torch.Generator) -> Tensor:
    """Of a dense weight: the mean of the heads' gradients, so the noise is smaller."""
    W = torch.zeros_like(signal)
    moved({"W": W}, lambda: {"W": signal + torch.randn(signal.shape, generator=g) / math.sqrt(heads)}, window, 0.0)
    return W


def change_by_lte(signal: Tensor, heads: int, rank: int, window: int, g: torch.Generator) -> Tensor:
    """Of a merge: both factors of every head trained, on the signal in noise of its own."""
    (out, into), scale = signal.shape, dense_equivalent_scale(heads)
    total = torch.zeros(out, into)
    for _ in range(heads):
        A, B = torch.empty(rank, into), torch.zeros(out, rank)
        nn.init.orthogonal_(A, gain=math.sqrt(into / rank), generator=g)

        def gradients(A: Tensor = A, B: Tensor = B) -> dict[str, Tensor]:
            G = signal + torch.randn(signal.shape, generator=g)
            return {"B": scale * G @ A.T, "A": scale * B.T @ G}

        moved({"A": A, "B": B}, gradients, window, rate_of_a(LEARNING_RATE, rank=rank, window=window))
        total += scale * B @ A / heads
    return total


@pytest.mark.parametrize("window", [10, 50])
@pytest.mark.parametrize(
    ("width", "rank", "heads"),
    [(64, 4, 1), (64, 16, 8), (64, 4, 32), (64, 64, 1), (256, 16, 8), (256, 64, 2), (1024, 64, 1), (1024, 4, 2)],
)
def test_a_merge_moves_the_weight_as_far_as_adamw(width: int, rank: int, heads: int, window: int) -> None:
    """The rms of the dense update within a tenth of AdamW's on the same samples."""
    g = torch.Generator().manual_seed(0)
    signal = SNR / math.sqrt(heads) * torch.randn(128, width, generator=g)
    dense = change_by_adamw(signal, heads, window, g).square().mean().sqrt().item()
    lte = change_by_lte(signal, heads, rank, window, g).square().mean().sqrt().item()
    assert lte == pytest.approx(dense, rel=0.1)


def test_a_stays_what_it_is_within_a_window() -> None:
    assert rate_of_a(1e-3, rank=16, window=10) == 1e-3
    assert rate_of_a(1e-3, rank=64, window=1000) * 1000 * math.sqrt(64) == pytest.approx(DRIFT)
