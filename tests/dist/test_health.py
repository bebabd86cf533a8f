"""The health of heads against the dense products it never forms."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_scale.adapters import LTELinear
from lte_scale.collectives import Collectives
from lte_scale.health import HeadHealth, Health, effective_rank, grams, inner_products
from lte_scale.topology import Topology
from tests.harness import DistributedPool


def dense(A_hRI: Tensor, B_hOR: Tensor) -> Tensor:
    return B_hOR @ A_hRI


def test_inner_products_and_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4, 20), (3, 12, 4)))
    deltas = dense(A, B)
    flat = deltas.flatten(1)
    torch.testing.assert_close(inner_products(*grams(A, B), 3), flat @ flat.T)
    squares = torch.linalg.svdvals(deltas.sum(0)) ** 2
    assert effective_rank(*grams(A, B)) == pytest.approx((squares.sum() ** 2 / (squares**2).sum()).item())
    assert effective_rank(*grams(A, torch.zeros_like(B))) == 0.0


def test_effective_rank_of_the_extremes() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert effective_rank(eye, eye) == pytest.approx(6)
    one = torch.ones(2, 1, 5, dtype=torch.float64)
    assert effective_rank(*grams(one, torch.ones(2, 7, 1, dtype=torch.float64))) == pytest.approx(1)


@pytest.mark.parametrize(("heads_per_node", "mode"), [(1, "reset"), (2, "reset"), (2, "resetless"), (4, "resetless")])
def test_of_a_node_is_that_of_its_heads(pool4: DistributedPool, heads_per_node: int, mode: str) -> None:
    """Two nodes of two ranks; on every rank what the dense deltas of its node's heads say."""
    found = pool4.run(measured, heads_per_node, mode)
    for node in (0, 1):
        first, second = found[2 * node : 2 * node + 2]
        assert first == second
        layers: list[Tensor] = expected(range(node * heads_per_node, (node + 1) * heads_per_node), mode)
        flat = torch.cat([deltas.flatten(1) for deltas in layers], 1)
        norms = flat.norm(dim=1)
        cosines = [(flat[a] @ flat[b] / norms[a] / norms[b]).item() for a, b in combinations(range(len(norms)), 2)]
        ranks = []
        for deltas in layers:
            squares = torch.linalg.svdvals(deltas.sum(0)) ** 2
            ranks.append((squares.sum() ** 2 / (squares**2).sum()).item())
        assert first.delta_norms == pytest.approx(norms.tolist(), rel=1e-5)
        assert first.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
        if heads_per_node == 1:
            assert first.cosine_mean is None and first.cosine_max is None
        else:
            assert first.cosine_mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
            assert first.cosine_max == pytest.approx(max(cosines), abs=1e-6)
        factors = heads_per_node * 3 * (2 if mode == "resetless" else 1)
        assert first.rank_ratio == pytest.approx(sum(r / min(factors, 8, 10) for r in ranks) / len(ranks), rel=1e-5)


def factors_of(head: int, layer: int, mode: str) -> list[Tensor]:
    """A [3, 10], B [8, 3] and, in resetless mode, those of the last merge."""
    generator = torch.Generator().manual_seed(1000 * head + layer)
    shapes = [(3, 10), (8, 3)] * (2 if mode == "resetless" else 1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expected(heads: range, mode: str) -> list[Tensor]:
    layers = []
    for layer in range(4):
        deltas = []
        for head in heads:
            A, B, *previous = (t.double() for t in factors_of(head, layer, mode))
            deltas.append(0.5 * (B @ A - (previous[1] @ previous[0] if previous else 0)))
        layers.append(torch.stack(deltas))
    return layers


class Stub:
    """What health needs of the heads of a model."""

    def __init__(self, ids: range, linears: dict[str, LTELinear]) -> None:
        self.ids, self.linears = ids, linears

    def parameters(self) -> dict[str, Tensor]:
        return {name: layer.A for name, layer in self.linears.items()}


def measured(rank: int, heads_per_node: int, mode: Any) -> Health:
    from lte_scale.adapters import Layout

    topology = Topology(nodes=2, ranks_per_node=2, heads_per_node=heads_per_node, rank=rank)
    layout, linears = Layout(heads=topology.heads_per_rank), {}
    for layer in range(4):
        linear = LTELinear(layout, (8, 10), rank=3, scale=0.5, mode=mode, bias=None)
        tensors = [linear.A.data, linear.B.data, linear.A_prev, linear.B_prev]
        for index, head in enumerate(topology.my_heads):
            for tensor, values in zip(tensors, factors_of(head, layer, mode), strict=False):
                assert tensor is not None
                tensor[index] = values
        linears[f"layer{layer}"] = linear
    heads: Any = Stub(topology.my_heads, linears)
    return HeadHealth(heads, Collectives(topology)).measure()
