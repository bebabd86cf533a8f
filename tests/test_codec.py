"""Values as bytes: how large, how exact, and that what cannot be kept shows."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lte_scale.codec import BLOCK, NF4, Codec

PRECISIONS = ["fp32", "bf16", "int8", "int4", "nf4"]
LOSSY = PRECISIONS[1:]


def values(shape: tuple[int, ...], seed: int, spread: float) -> Tensor:
    """Of magnitudes that differ by many powers of ten, with zeros and whole blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator)
    drawn *= 10 ** (spread * torch.randn(shape, generator=generator)).clamp(-30, 30)
    drawn[torch.rand(shape, generator=generator) < 0.2] = 0
    if shape[-1] > BLOCK:
        drawn[..., :BLOCK] = 0
    return drawn


shapes = st.one_of(st.tuples(st.integers(1, 3 * BLOCK)), st.tuples(st.integers(1, 3), st.integers(1, 2 * BLOCK)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PRECISIONS), shapes, st.integers(0, 2**30), st.sampled_from([0.0, 1.0, 8.0]))
def test_a_message(precision: str, shape: tuple[int, ...], seed: int, spread: float) -> None:
    """Its size, its error by block, and that what it decodes to encodes to it again."""
    codec, given_ = Codec(precision), values(shape, seed, spread)
    message = codec.encode(given_)
    assert message.dtype == torch.uint8
    assert message.shape == (*shape[:-1], codec.size(shape[-1]))
    decoded = codec.decode(message, shape[-1])
    assert decoded.shape == given_.shape and decoded.dtype == torch.float32
    assert torch.equal(codec.encode(decoded), message)
    assert torch.equal(codec.rounded(decoded), decoded)
    bound = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 1 / 253, "int4": 1 / 13, "nf4": 1 / 6.5}[precision]
    largest = given_.abs()
    if precision in ("int8", "int4", "nf4"):
        blocks = torch.nn.functional.pad(largest, (0, -shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        largest = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., : shape[-1]]
    assert ((decoded - given_).abs() <= bound * largest + 127 * torch.finfo(torch.bfloat16).tiny).all()


@pytest.mark.parametrize(
    ("precision", "sizes"),
    [
        ("fp32", {1: 4, 64: 256, 65: 260}),
        ("bf16", {1: 2, 64: 128, 65: 130}),
        ("int8", {1: 3, 64: 66, 65: 69}),
        ("int4", {1: 3, 64: 34, 65: 37}),
        ("nf4", {1: 3, 64: 34, 65: 37}),
    ],
)
def test_sizes_by_hand(precision: str, sizes: dict[int, int]) -> None:
    assert {n: Codec(precision).size(n) for n in sizes} == sizes
    assert Codec(precision).size(0) == 0
    assert Codec(precision).rounded(torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_block_alone(precision: str, bad: float) -> None:
    given_ = torch.ones(3 * BLOCK)
    given_[BLOCK + 5] = bad
    decoded = Codec(precision).rounded(given_)
    assert decoded[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.allclose(decoded[:BLOCK], torch.ones(BLOCK), rtol=0.01)
    assert torch.allclose(decoded[2 * BLOCK :], torch.ones(BLOCK), rtol=0.01)


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """As arXiv 2305.14314 builds them: 8 quantiles on one side, 7 on the other and zero, the outermost made 1."""
    quantile, edge = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(edge + (0.5 - edge) * i / 8) for i in range(8)]
    negative = [-quantile(edge + (0.5 - edge) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64) / positive[0]
    torch.testing.assert_close(NF4.double(), levels, rtol=0, atol=2e-7)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_nf4_takes_the_nearest_level_in_float64(spread: float) -> None:
    given_ = values((5, 200), 4, spread)
    blocks = torch.nn.functional.pad(given_, (0, -200 % BLOCK)).unflatten(-1, (-1, BLOCK)).double()
    scales = blocks.abs().amax(-1, keepdim=True).bfloat16().double()
    levels = scales.unsqueeze(-1) * NF4.double()
    distances = (blocks.unsqueeze(-1) - levels).abs()
    nearest = distances.amin(-1).flatten(-2)[..., :200]
    off = (Codec("nf4").rounded(given_).double() - given_.double()).abs()
    torch.testing.assert_close(off, nearest, rtol=1e-5, atol=1e-6 * given_.abs().max().item())


def test_bf16_keeps_what_is_not_finite() -> None:
    decoded = Codec("bf16").rounded(torch.tensor([1.0, float("nan"), float("inf")]))
    assert decoded[0] == 1 and decoded[1].isnan() and decoded[2].isinf()


def test_fp32_is_the_same_bits() -> None:
    given_ = torch.tensor([0.1, -0.0, float("nan"), 1e-45])
    assert torch.equal(Codec().rounded(given_).view(torch.int32), given_.view(torch.int32))
    decoded = Codec().decode(Codec().encode(given_), 4)
    assert torch.equal(decoded.view(torch.int32), given_.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", LOSSY)
def test_a_gpu_makes_messages_that_decode_alike(precision: str) -> None:
    codec, given_ = Codec(precision), values((3, 1000), 0, 1.0)
    message = codec.encode(given_.cuda())
    decoded = codec.decode(message, 1000)
    assert torch.equal(decoded.cpu(), codec.decode(message.cpu(), 1000))
    assert torch.equal(codec.encode(decoded), message)
