"""Layers against their specification, heads in one pass against heads apart, merges against the paper's equation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lte_scale.adapters import Layout, LTELinear, LTEPatchConv, lte_linear_reference
from lte_scale.assemble import assemble
from lte_scale.collectives import Collectives
from lte_scale.config.schema import (
    AdaptersConfig,
    Config,
    EngineConfig,
    MergeConfig,
    ModelConfig,
    TrainConfig,
)
from lte_scale.exchange import Factors, product
from lte_scale.merge import Merger
from lte_scale.model import Heads, attach, build
from lte_scale.topology import Topology
from tests.reference import CLASSES, TINY

SINGLE = Config(
    model=TINY,
    adapters=AdaptersConfig(rank=3, alpha=6),
    engine=EngineConfig(name="none"),
    train=TrainConfig(precision="fp32"),
    merge=MergeConfig(every=1),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(
    heads: int, *, mode: str = "reset", bias: bool = True, out: int = 5, into: int = 7, rank: int = 3
) -> LTELinear:
    made = LTELinear(
        Layout(heads),
        (out, into),
        rank=rank,
        scale=1.5,
        mode="reset" if mode == "reset" else "resetless",
        bias=torch.randn(out) if bias else None,
    )
    made.base.weight = nn.Parameter(torch.randn(out, into), requires_grad=False)
    for tensor in (made.A, made.B, made.A_prev, made.B_prev):
        if tensor is not None:
            tensor.data.normal_()
    return made


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_specification(heads: int, mode: str, bias: bool) -> None:
    made = layer(heads, mode=mode, bias=bias)
    x = torch.randn(heads * 2, 4, 7, requires_grad=True)
    y = made(x)
    wanted = lte_linear_reference(
        x.view(heads, 8, 7), made.base.weight, made.A, made.B, made.scale, made.bias, made.A_prev, made.B_prev
    ).view(heads * 2, 4, 5)
    torch.testing.assert_close(y, wanted)
    inputs = [x, made.A, made.B]
    weights = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad((y * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert made.base.weight.grad is None


def test_folded_base_needs_no_second_product() -> None:
    made = layer(1, mode="resetless")
    x = torch.randn(2, 7)
    y = made(x)
    assert made.A_prev is not None
    assert made.B_prev is not None
    made.base.weight.data -= made.scale * made.B_prev[0] @ made.A_prev[0]
    made.folded = True
    torch.testing.assert_close(made(x), y)


def test_patch_convolution_is_the_convolution() -> None:
    conv = nn.Conv2d(3, 5, (2, 4), stride=(2, 4))
    made = LTEPatchConv(Layout(1), (5, 24), rank=2, scale=1.0, mode="reset", bias=conv.bias)
    made.kernel = (2, 4)
    made.base.weight = nn.Parameter(conv.weight.detach().view(5, 24), requires_grad=False)
    made.A.data.normal_()
    made.B.data.zero_()
    x = torch.randn(2, 3, 9, 8)  # one row is left over, as a convolution leaves it
    torch.testing.assert_close(made(x), conv(x))


def single(heads: int, config: Config = SINGLE, first: int = 0) -> tuple[nn.Module, Heads, Merger]:
    nodes = first + 1  # this process is the last of them
    collectives = Collectives(Topology(nodes=nodes, heads_per_node=heads, rank=first))
    lte = assemble(config, CLASSES, collectives, torch.device("cpu"))
    return lte.model, lte.heads, lte.merger


def randomise(heads: Heads) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in heads.parameters().values():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_heads_in_one_pass_equal_heads_apart() -> None:
    model, heads, _ = single(3)
    randomise(heads)
    x = torch.randn(6, 1, 28, 28)
    losses = F.cross_entropy(model(x), torch.arange(6), reduction="none").view(3, 2).mean(1)
    losses.sum().backward()
    for head in range(3):
        alone, one, _ = single(1, first=head)
        for name, parameter in one.parameters().items():
            parameter.data.copy_(heads.parameters()[name].data[head].view(parameter.shape))
        loss = F.cross_entropy(alone(x[2 * head : 2 * head + 2]), torch.arange(2 * head, 2 * head + 2))
        loss.backward()
        torch.testing.assert_close(losses[head], loss)
        for name, parameter in one.parameters().items():
            together, apart = heads.parameters()[name].grad, parameter.grad
            assert together is not None
            assert apart is not None
            torch.testing.assert_close(together[head].reshape(apart.shape), apart, rtol=1e-4, atol=1e-6)


def test_every_head_starts_elsewhere_and_b_at_zero() -> None:
    _, heads, _ = single(2)
    for made in heads.linears.values():
        assert not torch.equal(made.A[0], made.A[1])
        assert not made.B.any()
        rank, into = made.A.shape[1:]
        gram = made.A[0] @ made.A[0].T
        torch.testing.assert_close(gram, torch.eye(rank) * into / rank, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_merge_is_the_papers_equation_in_float64(mode: str) -> None:
    _, heads, merger = single(3, replace(SINGLE, adapters=replace(SINGLE.adapters, mode=mode)))
    randomise(heads)
    wanted: dict[str, Tensor] = {}
    for name, made in heads.linears.items():
        delta = torch.bmm(made.B.double(), made.A.double())
        if made.A_prev is not None and made.B_prev is not None:
            delta = delta - torch.bmm(made.B_prev.double(), made.A_prev.double())
        wanted[name] = made.base.weight.double() + made.scale * delta.mean(0)
    merger.merge(1)
    for name, made in heads.linears.items():
        torch.testing.assert_close(made.base.weight.double(), wanted[name].detach(), rtol=1e-6, atol=1e-7)
        if mode == "reset":
            assert not made.B.any()


def test_weight_decay_takes_from_the_master_alone() -> None:
    _, heads, merger = single(2)
    randomise(heads)
    made = heads.linears["blocks.0.mlp.fc1"]
    wanted = 0.9 * made.base.weight + made.scale * torch.bmm(made.B, made.A).mean(0)
    bias = made.bias.mean(0) if made.bias is not None else None
    merger.merge(1, decay=0.1)
    torch.testing.assert_close(made.base.weight, wanted)
    assert bias is not None
    torch.testing.assert_close(heads.replicas["blocks.0.mlp.fc1.bias"][1], bias)


def test_the_moving_average_follows_the_master_at_merges() -> None:
    config = replace(SINGLE, train=replace(SINGLE.train, ema_decay=0.75))
    model, heads, merger = single(1, config)
    made = heads.linears["head"]
    average = made.base.weight.clone()
    for step in (1, 2):
        randomise(heads)
        merger.merge(step)
        average = 0.75 * average + 0.25 * made.base.weight
    kept = made.base.weight.clone()
    with merger.merged(average=True):
        torch.testing.assert_close(made.base.weight, average)
        model(torch.randn(5, 1, 28, 28))  # any number of samples: no head is active
    assert torch.equal(made.base.weight, kept)


def test_resetless_merge_changes_no_heads_function() -> None:
    """One head: what the merge adds to the base it takes from the forward pass."""
    model, heads, merger = single(1, replace(SINGLE, adapters=replace(SINGLE.adapters, mode="resetless")))
    randomise(heads)
    x = torch.randn(2, 1, 28, 28)
    before = model(x)
    merger.merge(1)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_one_head_merged_every_step_resetless_is_plain_lora() -> None:
    config = replace(SINGLE, adapters=replace(SINGLE.adapters, mode="resetless"))
    runs = []
    for merging in (True, False):
        model, heads, merger = single(1, config)
        optimizer = torch.optim.AdamW(heads.parameters().values(), lr=1e-3, eps=1e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(3)
        for step in range(1, 11):
            x = torch.randn(4, 1, 28, 28, generator=generator)
            F.cross_entropy(model(x), torch.randint(0, CLASSES, (4,), generator=generator)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if merging:
                merger.merge(step)
        runs.append({name: p.detach().clone() for name, p in heads.parameters().items()})
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-5, atol=1e-6)


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest matrix product made within."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_a_part_of_the_product_costs_that_part() -> None:
    out, into, rank, heads = 256, 128, 2, 3
    A, B = torch.randn(heads, rank, into), torch.randn(heads, out, rank)
    with LargestAllocation() as largest:
        (part,) = product(Factors(A.flatten(1), B.flatten(1)), (out, into), rank, [(1000, 5000)], 0.5)
    assert largest.numel <= 33 * into  # rows 7 ... 39 of 256
    torch.testing.assert_close(part, 0.5 * torch.bmm(B, A).sum(0).flatten()[1000:5000])


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("resnet18", 1, "conv1"),
        ("convnext_atto", 1, "conv_dw"),
        ("vit_tiny_patch16_244", 1, "vit_tiny_patch16_224"),
        ("beit_base_patch16_224", 2, "q_bias"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(name: str, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(build(ModelConfig(name=name), 10, seed=0), AdaptersConfig(), range(heads), seed=0)


def test_batch_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer bn1 is a .*running statistics"):
        attach(build(ModelConfig(name="resnet18"), 10, seed=0), AdaptersConfig(dense=["*conv*"]), range(1), seed=0)


@pytest.mark.parametrize("pattern", [{"rank_by_layer": {"blocks.*.attn.kqv": 4}}, {"dense": ["haed"]}])
def test_a_pattern_that_matches_nothing_is_refused(pattern: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        attach(build(TINY, 10, seed=0), AdaptersConfig(**pattern), range(1), seed=0)  # type: ignore[arg-type]


def test_rank_and_dense_by_pattern() -> None:
    config = AdaptersConfig(rank=8, rank_by_layer={"blocks.0.*": 2, "blocks.*.mlp.*": 4}, dense=["head"])
    heads = attach(build(TINY, 10, seed=0), config, range(2), seed=0)
    ranks = {name: made.A.shape[1] for name, made in heads.linears.items()}
    assert ranks["blocks.0.mlp.fc1"] == 2
    assert ranks["blocks.1.mlp.fc1"] == 4
    assert ranks["blocks.1.attn.qkv"] == 8
    assert "head" not in heads.linears
    assert heads.replicas["head.weight"].shape == (2, 10, 24)
    assert heads.replica_shapes["head.weight"] == (10, 24)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit3_small_patch16_224", 224),
        ("eva02_tiny_patch14_224", 224),
        ("vit_small_patch16_rope_224", 224),
        ("beit_base_patch16_224", 224),
    ],
)
def test_other_vision_transformers_learn_through_every_parameter(name: str, size: int) -> None:
    config = replace(SINGLE, model=ModelConfig(name=name, image_size=size))
    model, heads, _ = single(1, config)
    model(torch.randn(1, 3, size, size)).sum().backward()
    assert [n for n, p in heads.parameters().items() if p.grad is None] == []
