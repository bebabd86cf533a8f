"""The base held in few bits: the layer against one that holds the decoded weight, merges that lose nothing, memory."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lte_scale.adapters import Layout, LTELinear
from lte_scale.assemble import LTE, assemble
from lte_scale.codec import Codec
from lte_scale.collectives import Collectives
from lte_scale.config import load_config
from lte_scale.config.schema import (
    AdaptersConfig,
    BaseConfig,
    Config,
    EngineConfig,
    MergeConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from lte_scale.engines.base import SingleEngine
from lte_scale.estimate import Plan, make_plan
from lte_scale.model import attach, build
from lte_scale.topology import Topology
from tests.reference import CLASSES, TINY

PRECISIONS = ["int8", "nf4"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pair(precision: str, heads: int, out: int, into: int, mode: str) -> tuple[LTELinear, LTELinear]:
    """A layer with a quantised weight, and the same with what it decodes to, held plainly."""
    layers = []
    weight = torch.randn(out, into)
    for quantised in (True, False):
        torch.manual_seed(1)
        made = LTELinear(
            Layout(heads),
            (out, into),
            rank=3,
            scale=1.5,
            mode="reset" if mode == "reset" else "resetless",
            bias=torch.randn(out),
        )
        for tensor in (made.A, made.B, made.A_prev, made.B_prev, made.bias):
            if tensor is not None:
                tensor.data.normal_()
        if quantised:
            made.base.quantise(precision)
            made.base.weight = nn.Parameter(torch.zeros_like(made.base.weight, device="cpu"), requires_grad=False)
            made.base.renew(made.base.weight.data, weight.flatten(), torch.device("cpu"))
        else:
            made.base.weight = nn.Parameter(Codec(precision).rounded(weight), requires_grad=False)
        layers.append(made)
    return layers[0], layers[1]


def outputs_and_gradients(made: LTELinear, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = made(x)
    wanted = {"x": x, "A": made.A, "B": made.B, "bias": made.bias}
    found = torch.autograd.grad((y.float() * weights).sum(), [t for t in wanted.values() if t is not None])
    return {"y": y, **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("out", "into"), [(5, 7), (96, 128), (1, 65), (130, 3)])
@pytest.mark.parametrize("rows", [1, 200])
def test_a_layer_is_the_plain_layer_with_the_decoded_weight(
    precision: str, heads: int, mode: str, autocast: bool, out: int, into: int, rows: int
) -> None:
    quantised, plain = pair(precision, heads, out, into, mode)
    x, weights = torch.randn(heads, rows, into), torch.randn(heads, rows, out)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = (outputs_and_gradients(made, x, weights) for made in (quantised, plain))
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_is_eager(precision: str) -> None:
    torch.compiler.reset()  # so many variants of one function are compiled, and other tests have had theirs
    made, _ = pair(precision, 1, 96, 130, "reset")
    x, weights = torch.randn(1, 200, 130), torch.randn(1, 200, 96)
    compiled = cast(LTELinear, torch.compile(copy.copy(made), fullgraph=True))
    want, got = outputs_and_gradients(made, x, weights), outputs_and_gradients(compiled, x, weights)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-4)


class Alive(TorchDispatchMode):
    """Counts the tensors of floating-point numbers of one size that are alive."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen, self.now, self.most = numel, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel and out.is_floating_point() and not func.is_view:
            self.seen += 1
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(out.untyped_storage(), self._freed).atexit = False
        return out

    def _freed(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 200])
def test_no_decoded_weight_is_kept_between_forward_and_backward(precision: str, rows: int) -> None:
    out, into = 48, 64
    made, _ = pair(precision, 1, out, into, "reset")
    x = torch.randn(1, rows, into, requires_grad=True)
    with Alive(out * into) as alive:
        y = made(x)
        decoded = alive.seen
        assert decoded > 0
        assert alive.now == 0
        y.sum().backward()
    assert alive.seen > decoded
    assert alive.now == 0


CONFIG = Config(
    model=TINY,
    adapters=AdaptersConfig(rank=3, alpha=6),
    engine=EngineConfig(name="none"),
    train=TrainConfig(precision="fp32"),
    merge=MergeConfig(every=1),
)


def single(precision: str, config: Config = CONFIG, heads: int = 2) -> LTE:
    config = replace(config, base=replace(config.base, precision=precision))
    return assemble(config, CLASSES, Collectives(Topology(heads_per_node=heads)), torch.device("cpu"))


def learn(lte: LTE, size: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in lte.heads.parameters().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [0.02, 1e-5])
def test_small_merges_add_up_in_the_master(precision: str, size: float) -> None:
    """The masters are those of a run that is not quantised, bit for bit; what is computed with is made from them."""
    plain, quantised = single("auto"), single(precision)
    for step in range(1, 6):
        for lte in (plain, quantised):
            learn(lte, size)
            lte.merger.merge(step)
    for name, layer in quantised.heads.linears.items():
        master = quantised.merger.outer.masters[name]
        assert torch.equal(master, plain.merger.outer.masters[name])
        held = Codec(precision).encode(master.view(layer.base.shape))
        assert torch.equal(layer.base.weight, held)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_merged_weights_are_the_master_as_exported(precision: str) -> None:
    plain, quantised = single("auto"), single(precision)
    for lte in (plain, quantised):
        learn(lte, 0.02)
        lte.merger.merge(1)
    held = {name: layer.base.weight.clone() for name, layer in quantised.heads.linears.items()}
    x = torch.randn(3, 1, 28, 28)
    with plain.merged() as wanted, quantised.merged() as model, torch.no_grad():
        assert torch.equal(model(x), wanted(x))
    for name, layer in quantised.heads.linears.items():
        assert torch.equal(layer.base.weight, held[name])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_base_learns(precision: str) -> None:
    config = replace(CONFIG, merge=MergeConfig(every=4), optimizer=OptimizerConfig(lr=1e-2, replica_lr=1e-2))
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(8, 1, 28, 28, generator=generator), torch.arange(8) % CLASSES

    def losses(precision: str) -> list[float]:
        lte, found = single(precision, config), []
        for step in range(1, 13):
            loss = F.cross_entropy(lte.model(images), labels)
            loss.backward()
            lte.optimizer.step(loss.detach().expand(2))
            if lte.merger.due(step):
                lte.merger.merge(step)
            found.append(loss.item())
        return found

    plain, quantised = losses("auto"), losses(precision)
    assert quantised[-1] < 0.8 * quantised[0]
    assert quantised[0] != plain[0]


def vit_l(precision: str) -> tuple[Plan, dict[str, int]]:
    """ViT-L, rank 64, in one process with the master in CPU memory: the plan, and bytes of the tensors there are."""
    config = Config(
        model=ModelConfig(name="vit_large_patch16_224", num_classes=1000),
        adapters=AdaptersConfig(rank=64),
        engine=EngineConfig(name="none"),
        base=BaseConfig(precision=precision, offload="cpu"),
        train=TrainConfig(precision="bf16", batch_size=1),
    )
    planned = make_plan(config, nodes=1, ranks_per_node=1)
    meta = torch.device("meta")
    model = build(config.model, 1000, seed=0)
    with meta:
        heads = attach(model, config.adapters, range(1), seed=0)
    for layer in heads.linears.values():
        layer.base.quantise(precision)
    SingleEngine(model, heads, BaseConfig(), device=meta, compute_dtype=torch.bfloat16)
    held = sum(layer.base.weight.nbytes for layer in heads.linears.values())
    trained = sum(parameter.nbytes for parameter in heads.parameters().values())
    replicas = sum(parameter.nbytes for parameter in heads.replicas.values())
    return planned, {"held": held, "trained": trained, "replicas": replicas}


@pytest.mark.parametrize(("precision", "most"), [("nf4", 1 / 8), pytest.param("int8", 1 / 6, marks=pytest.mark.slow)])
def test_the_state_of_vit_l_is_a_small_part_of_full_rank_adamws(precision: str, most: float) -> None:
    planned, found = vit_l(precision)
    memory = planned.memory
    assert memory.gathered == found["held"]
    assert memory.factors + memory.replicas == memory.gradients == found["trained"]
    assert memory.optimizer_state == 2 * found["trained"]
    assert memory.master == found["replicas"]
    assert memory.cpu == 4 * sum(layer.values for layer in planned.arrangement.shapes.layers.values())
    state = found["held"] + 4 * found["trained"] + found["replicas"]
    assert state < most * 16 * planned.arrangement.shapes.values


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["base.precision=int4"], "did you mean int8?"),
        (["base.precision=nf4", "engine=deepspeed"], "use engine=fsdp or base.precision=auto"),
        (["base.precision=nf4", "method=full"], "there is no frozen base"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=r"base\.precision") as error:
        load_config(None, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
