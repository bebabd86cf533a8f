"""The layer's arithmetic against its specification: forward and all gradients, in every way it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lte_scale.adapters import Layout, LTELinear, lte_linear_reference

ROWS = 6  # of every head


def layer(heads: int, out: int, into: int, rank: int, *, mode: str, bias: bool, dtype: torch.dtype) -> LTELinear:
    made = LTELinear(
        Layout(heads),
        (out, into),
        rank=rank,
        scale=1.5,
        mode="reset" if mode == "reset" else "resetless",
        bias=torch.randn(out) if bias else None,
    )
    made.base.weight = nn.Parameter(torch.randn(out, into), requires_grad=False)
    for tensor in (made.A, made.B, made.A_prev, made.B_prev, made.bias):
        if tensor is not None:
            tensor.data.normal_()
    return made.to(dtype)


def outputs_and_gradients(
    call: Callable[[Tensor], Tensor], made: LTELinear, x: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    wanted = {"x": x, "A": made.A, "B": made.B, **({} if made.bias is None else {"bias": made.bias})}
    found = torch.autograd.grad((y * weights).sum(), list(wanted.values()))
    return {"y": y, **dict(zip(wanted, found, strict=True))}


def reference(made: LTELinear, x: Tensor) -> Tensor:
    x_HMI = x.reshape(made.layout.heads, -1, x.shape[-1])
    y = lte_linear_reference(x_HMI, made.base.weight, made.A, made.B, made.scale, made.bias, made.A_prev, made.B_prev)
    return y.view(*x.shape[:-1], -1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "into", "rank"), [(5, 7, 3), (16, 8, 4), (1, 33, 1), (9, 2, 12)])
def test_float64_is_the_specification(heads: int, mode: str, bias: bool, out: int, into: int, rank: int) -> None:
    made = layer(heads, out, into, rank, mode=mode, bias=bias, dtype=torch.float64)
    x = torch.randn(heads * 2, ROWS // 2, into, dtype=torch.float64)
    weights = torch.randn(heads * 2, ROWS // 2, out, dtype=torch.float64)
    got = outputs_and_gradients(made, made, x, weights)
    want = outputs_and_gradients(lambda x: reference(made, x), made, x, weights)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("of", ["input", "gradient"])
def test_memory_that_is_not_contiguous(heads: int, of: str) -> None:
    made = layer(heads, 5, 7, 3, mode="reset", bias=True, dtype=torch.float64)
    x, weights = torch.randn(heads, ROWS, 7).double(), torch.randn(heads, ROWS, 5).double()
    want = outputs_and_gradients(lambda x: reference(made, x), made, x, weights)
    if of == "input":
        x = x.mT.contiguous().mT
    else:
        weights = weights.mT.contiguous().mT
    got = outputs_and_gradients(made, made, x, weights)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
    y = made(x)
    y.sum().backward()  # one number, expanded
    torch.testing.assert_close(made.bias.grad, torch.full((heads, 5), ROWS).double())  # type: ignore[union-attr]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_is_eager(heads: int, mode: str, autocast: bool) -> None:
    made = layer(heads, 16, 24, 4, mode=mode, bias=True, dtype=torch.float32)
    x, weights = torch.randn(heads * 2, 3, 24), torch.randn(heads * 2, 3, 16)
    compiled = torch.compile(copy.copy(made), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = outputs_and_gradients(made, made, x, weights)
        got = outputs_and_gradients(compiled, made, x, weights)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-2 if autocast else 1e-5, atol=1e-1 if autocast else 1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32(heads: int, mode: str) -> None:
    made = layer(heads, 16, 24, 4, mode=mode, bias=True, dtype=torch.float32)
    x, weights = torch.randn(heads * 2, 3, 24), torch.randn(heads * 2, 3, 16)
    want = outputs_and_gradients(lambda x: reference(made, x), made, x, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(made, made, x, weights)
    assert got["y"].dtype == torch.bfloat16
    for name, value in want.items():
        assert (got[name].float() - value).norm() < 2e-2 * value.norm(), name
        assert name == "y" or got[name].dtype == torch.float32


class Sizes(TorchDispatchMode):
    """Takes down the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and "out" not in (kwargs or {}):
            self.made.append((str(func), tuple(result.shape)))
        return result


@pytest.mark.parametrize("heads", [1, 3])
def test_few_rows_form_nothing_as_large_as_the_weight(heads: int) -> None:
    made = layer(heads, 40, 50, 2, mode="resetless", bias=True, dtype=torch.float32)
    x = torch.randn(heads, ROWS, 50, requires_grad=True)
    with Sizes() as seen:
        made(x).sum().backward()
    assert not [entry for entry in seen.made if sorted(entry[1][-2:]) == [40, 50]], seen.made


@pytest.mark.parametrize("heads", [1, 3])
def test_many_rows_form_no_gradient_of_the_weight_and_keep_nothing_of_its_size(heads: int) -> None:
    made = layer(heads, 8, 6, 2, mode="resetless", bias=True, dtype=torch.float32)
    x = torch.randn(heads, 100, 6, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Sizes() as seen:
        y = made(x)
        seen.made.clear()
        y.sum().backward()
    assert not [t for t in kept if sorted(t.shape[-2:]) == [6, 8]]
    assert [shape for _, shape in seen.made if sorted(shape[-2:]) == [6, 8]] == [(*([heads] * (heads > 1)), 8, 6)]
