"""Initial factors: every head's rows orthonormal up to their length, and all heads' rows spread over the inputs."""

from __future__ import annotations

import math

import pytest
import torch

from lte_scale.initial import orthogonal_factor

SHAPES = [(16, 96), (16, 50), (7, 10), (10, 10), (1, 5)]


@pytest.mark.parametrize(("rank", "into"), SHAPES)
@pytest.mark.parametrize("head", [0, 1, 5, 63])
def test_rows_of_a_head_are_orthogonal_and_of_length_sqrt_into_over_rank(rank: int, into: int, head: int) -> None:
    A = orthogonal_factor("layer", rank, into, head, seed=3)
    torch.testing.assert_close(A @ A.T, into / rank * torch.eye(rank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "into", "heads"), [(16, 96, 6), (16, 96, 12), (5, 10, 4), (4, 4, 3)])
def test_heads_that_fill_whole_bases_see_every_direction_alike(rank: int, into: int, heads: int) -> None:
    """sum_n A_n^T A_n = N 1: the mean of B_n A_n for B_n = G A_n^T is G itself, whatever G."""
    A = torch.stack([orthogonal_factor("layer", rank, into, head, seed=0).double() for head in range(heads)])
    G = torch.randn(7, into, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = torch.stack([G @ a.T @ a for a in A]).mean(0)
    torch.testing.assert_close(merged, G, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rank", "into", "heads"), [(16, 96, 8), (16, 50, 5), (16, 384, 8)])
def test_other_numbers_of_heads_see_directions_more_alike_than_independent_draws(
    rank: int, into: int, heads: int
) -> None:
    """The distance of a merge from the gradient, beside that of uniformly random frames."""

    def error(factors: list[torch.Tensor]) -> float:
        mean = sum(a.T @ a for a in factors) / heads
        return float(torch.linalg.matrix_norm(mean - torch.eye(into)))

    spread = error([orthogonal_factor("layer", rank, into, head, seed=0) for head in range(heads)])
    independent = []
    for head in range(heads):
        values = torch.empty(rank, into)
        torch.nn.init.orthogonal_(values, math.sqrt(into / rank), torch.Generator().manual_seed(head))
        independent.append(values)
    assert spread < 0.9 * error(independent)


def test_it_depends_on_layer_head_and_seed_alone() -> None:
    def draw(name: str = "a", head: int = 0, seed: int = 0) -> torch.Tensor:
        return orthogonal_factor(name, 32, 96, head, seed=seed)

    assert torch.equal(draw(), draw())
    for other in (draw(name="b"), draw(head=1), draw(head=3), draw(seed=1)):  # head 3 begins the second basis
        assert (draw() @ other.T).abs().max() < 0.7 * 96 / 32
