"""Gradients averaged while the backward pass goes on, against the mean of each rank's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lte_scale.averaging import GradientAverage
from lte_scale.collectives import Collectives, all_reduce_bytes
from lte_scale.topology import Topology
from tests.harness import DistributedPool

WIDTH, DEPTH, STEPS = 24, 6, 3
PART_BYTES = 4 * WIDTH * WIDTH + 100  # cuts through weights


class Model(nn.Module):
    """Layers after one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def batch(step: int, number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
    return torch.randn(5, WIDTH, generator=generator)


def averaged(rank: int, over: str, passes: int, part_bytes: int) -> tuple[list[list[torch.Tensor]], list[int], int]:
    """Gradients of every step; parts under way when its last backward pass reached the input; bytes sent."""
    heads = {"head": 1, "all": 2}[over]
    collectives = Collectives(Topology(nodes=2, ranks_per_node=2, heads_per_node=heads, rank=rank))
    group = {"head": collectives.head, "all": collectives.world}[over]
    model = Model()
    backward = dict(reversed(list(model.named_parameters())))
    average = GradientAverage(backward, collectives, group, passes=passes, part_bytes=part_bytes)
    found, under_way = [], []
    for step in range(STEPS):
        begun = 0
        for number in range(passes):
            x = batch(step, number, rank).requires_grad_()

            def reached(_: torch.Tensor) -> None:
                nonlocal begun
                begun = len(average.waits)

            x.register_hook(reached)
            model(x).square().mean().backward()
            if number + 1 < passes:
                assert not average.waits
        under_way.append(begun)
        assert set(average.without_gradient()) == {"unused.bias", "unused.weight"}
        average.finish()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        average.clear()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert all(part.numel() % group.size == 0 for part in average.parts[:-1])
    return found, under_way, sum(collectives.bytes_sent.values())


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("part_bytes", [PART_BYTES, 0])
@pytest.mark.parametrize("over", ["head", "all"])
def test_it_is_the_mean_of_the_ranks_own(pool4: DistributedPool, over: str, passes: int, part_bytes: int) -> None:
    results = pool4.run(averaged, over, passes, part_bytes)
    groups = [[0, 1], [2, 3]] if over == "head" else [[0, 1, 2, 3]]
    values = sum(p.numel() for p in Model().parameters())
    for ranks in groups:
        for step in range(STEPS):
            model = Model()
            for rank in ranks:
                for number in range(passes):
                    (model(batch(step, number, rank)).square().mean() / len(ranks)).backward()
            expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            for rank in ranks:
                torch.testing.assert_close(results[rank][0][step], expected, rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(results[rank][0][step], results[ranks[0]][0][step], rtol=0, atol=0)
    for _, under_way, sent in results:
        assert sent == STEPS * all_reduce_bytes(len(groups[0]), 4 * values)
        if part_bytes == PART_BYTES:
            assert under_way == [DEPTH - 1] * STEPS  # not yet the first layer's, nor what is never used


def one_pass_too_many(rank: int) -> str:
    collectives = Collectives(Topology(nodes=1, ranks_per_node=2, heads_per_node=1, rank=rank))
    model = Model()
    average = GradientAverage(dict(model.named_parameters()), collectives, collectives.head)
    model(batch(0, 0, rank)).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        model(batch(0, 1, rank)).sum().backward()
    average.finish()
    return str(caught.value)


def test_a_backward_pass_too_many_is_an_error(pool4: DistributedPool) -> None:
    """It would add to what has been summed."""
    for message in pool4.run(one_pass_too_many, world_size=2):
        assert "train.accumulate, 1" in message
