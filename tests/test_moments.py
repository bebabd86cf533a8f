"""AdamW's moments in few bits: what rounding keeps, and training beside moments in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lte_scale.adam import build_adam
from lte_scale.checkpoint import Checkpoints
from lte_scale.config.schema import CheckpointConfig
from lte_scale.moments import HeldMoments, moment_bytes
from tests.test_optimizers import ALL, HEADS, everything, new_run, train

CPU = torch.device("cpu")
FEW_BITS = pytest.mark.parametrize("precision", ["bf16", "log8"])
# Of the largest of neighbouring values: a unit in the last place of bf16, and 2^(1/8) - 1.
WIDEST = {"bf16": 2**-7, "log8": 0.0906}


def adam_of(*parameters: nn.Parameter, beta2: float = 0.999) -> AdamW:
    adam = build_adam("adamw", [{"params": [*parameters]}], betas=(0.9, beta2), eps=1e-8, device=CPU)
    assert isinstance(adam, AdamW)
    return adam


def put(held: HeldMoments, adam: AdamW, parameter: nn.Parameter, moments: dict[str, Tensor], step: int = 1) -> None:
    with held.decoded():
        adam.state[parameter]["step"].fill_(step)
        for kind, value in moments.items():
            adam.state[parameter][kind].copy_(value)


def got(held: HeldMoments, adam: AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    with held.decoded():
        return {kind: adam.state[parameter][kind].clone() for kind in ("exp_avg", "exp_avg_sq")}


@FEW_BITS
def test_values_are_one_of_their_two_neighbours_and_stay(precision: str) -> None:
    """Over many octaves, with zeros, in rows that blocks do not divide; untouched they are the same bits."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(HEADS, 7, 21))
    adam = adam_of(parameter)
    held = HeldMoments(adam, precision, HEADS)
    values = torch.randn(parameter.shape) * torch.exp2(torch.randint(-10, 0, parameter.shape) - 30.0)
    values[0, 0, ::2] = 0
    values[1] = 0
    for step in (1, 2, 3):
        put(held, adam, parameter, {"exp_avg": values, "exp_avg_sq": values**2}, step)
        found = got(held, adam, parameter)
        for kind, wanted in (("exp_avg", values), ("exp_avg_sq", values**2)):
            errors = (found[kind] - wanted).abs()
            assert (errors <= WIDEST[precision] * wanted.abs() * (1 + 1e-4)).all()
            assert errors.any() and torch.equal(found[kind] == 0, wanted == 0)
        put(held, adam, parameter, {}, step + 7)  # another dither
        again = got(held, adam, parameter)
        assert all(torch.equal(again[kind], found[kind]) for kind in found)


def test_what_is_too_small_for_its_block() -> None:
    """exp_avg is zero then, exp_avg_sq the least: a step is too short rather than too long."""
    parameter = nn.Parameter(torch.zeros(64))
    adam = adam_of(parameter)
    held = HeldMoments(adam, "log8", 1)
    small = torch.full((64,), 2.0**-20)
    small[0] = -1.0
    put(held, adam, parameter, {"exp_avg": small, "exp_avg_sq": small**2})
    found = got(held, adam, parameter)
    assert found["exp_avg"][0] == -1 and found["exp_avg_sq"][0] == 1
    assert not found["exp_avg"][1:].any()
    assert found["exp_avg_sq"][1:].unique().tolist() == [pytest.approx(2.0 ** (-254 / 8), rel=1e-6)]


@FEW_BITS
def test_rounding_keeps_the_mean(precision: str) -> None:
    """Over neighbours at once, and of one value over steps."""
    parameter = nn.Parameter(torch.zeros(64 * 64))
    adam = adam_of(parameter)
    held = HeldMoments(adam, precision, 1)
    over_steps = []
    for step in range(1, 257):
        value = torch.full(parameter.shape, 0.7137)
        value[0] = 1.0
        put(held, adam, parameter, {"exp_avg": value, "exp_avg_sq": value}, step)
        for moment in got(held, adam, parameter).values():
            assert moment[1:].mean() == pytest.approx(0.7137, rel=1e-3)
        over_steps.append(float(moment[5]))
    assert len(set(over_steps)) == 2
    assert sum(over_steps) / 256 == pytest.approx(0.7137, rel=1e-3)


@FEW_BITS
def test_follows_adamw(precision: str) -> None:
    """A thousand steps over noisy gradients of unlike size, whose noise falls to a tenth: exp_avg_sq follows it down,
    and parameters go where they go with moments in fp32."""
    torch.manual_seed(1)
    sizes = torch.exp2(torch.randint(-6, 1, (HEADS, 300)).float())
    mean = torch.randn(HEADS, 300)
    mine, wanted = (nn.Parameter(torch.zeros(HEADS, 300)) for _ in range(2))
    adams = [adam_of(mine, beta2=0.99), adam_of(wanted, beta2=0.99)]
    held = HeldMoments(adams[0], precision, HEADS)
    for group in (*adams[0].param_groups, *adams[1].param_groups):
        group["lr"] = 1e-3
    for step in range(1000):
        noise = torch.randn(HEADS, 300) * (3.0 if step < 500 else 0.3)
        mine.grad, wanted.grad = ((mean + noise) * sizes for _ in range(2))
        with held.decoded():
            adams[0].step()
        adams[1].step()
    assert (mine - wanted).norm() < {"bf16": 0.01, "log8": 0.06}[precision] * wanted.norm()
    squares, exact = got(held, adams[0], mine)["exp_avg_sq"], adams[1].state[wanted]["exp_avg_sq"]
    assert (squares / exact).mean() == pytest.approx(1, rel=0.05)
    assert (squares / exact).log().std() < {"bf16": 0.05, "log8": 0.25}[precision]


@FEW_BITS
def test_a_skipped_head_keeps_its_moments(precision: str) -> None:
    lte, pieces = new_run("adamw", CPU, precision)
    train(lte, range(1, 6))
    before = everything(pieces)
    train(lte, range(6, 8), skipped=1)
    after = everything(pieces)
    for name in (name for name in before if name.endswith(("exp_avg", "exp_avg_sq"))):
        assert torch.equal(before[name], after[name]) == name.startswith("head/1/"), name
    lte.optimizer.start_again(2)
    lte.optimizer.restart("reset_b")
    cleared = everything(pieces)
    assert not any(v.any() for k, v in cleared.items() if k.endswith(".B/exp_avg_sq"))
    assert not any(v.any() for k, v in cleared.items() if k.startswith("head/2/") and k.endswith("exp_avg"))
    assert all(torch.equal(v, after[k]) for k, v in cleared.items() if k.endswith(".A/exp_avg_sq"))


@pytest.mark.parametrize(("first", "then"), [("log8", "log8"), ("bf16", "bf16"), ("fp32", "log8"), ("log8", "fp32")])
def test_resumes(tmp_path: Path, first: str, then: str) -> None:
    """Bit for bit with the same setting, and with another one; a save changes nothing."""
    lte, pieces = new_run("adamw", CPU, first)
    train(lte, range(1, 20))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), lte.merger.collectives)
    (tmp_path / "checkpoints").mkdir()
    saved = everything(pieces)
    checkpoints.save(pieces, {"step": 19}, "text\n", top1=None, wait=True)
    other, resumed = new_run("adamw", CPU, then)
    found = checkpoints.find("auto")
    assert found is not None
    checkpoints.load(found, resumed)
    checkpoints.close()
    if first in (then, "log8"):
        assert all(torch.equal(value, saved[name]) for name, value in everything(resumed).items())
    train(lte, range(20, 30))
    train(other, range(20, 30))
    ours, theirs = everything(resumed), everything(pieces)
    for name, wanted in theirs.items():
        if first == then:
            assert torch.equal(ours[name], wanted), name
        elif name.endswith((".A", ".B")):
            assert (ours[name] - wanted).norm() < 0.05 * wanted.norm(), name


@pytest.mark.parametrize(("name", "device"), ALL)
def test_any_optimizer(name: str, device: torch.device) -> None:
    """Its parameters go where those of torch's on a CPU go; nothing of it is kept in fp32 between steps."""
    (mine, _), (plain, _) = new_run(name, device, "log8"), new_run("adamw", CPU, "log8")
    for lte in (mine, plain):
        train(lte, range(1, 20))
    for key, parameter in mine.optimizer.parameters.items():
        wanted = plain.optimizer.parameters[key]
        assert (parameter.detach().cpu() - wanted.detach()).norm() < 0.05 * wanted.detach().norm(), key
    assert not any("exp_avg" in state for state in mine.optimizer.adam.state.values())


@FEW_BITS
def test_bytes_held(precision: str) -> None:
    """As planned, to what parameters that blocks do not divide are padded by."""
    lte, _ = new_run("adamw", CPU, precision)
    assert lte.optimizer.held is not None
    held = sum(t.nbytes for tensors in lte.optimizer.held.held.values() for t in tensors)
    assert not any("exp_avg" in state for state in lte.optimizer.adam.state.values())
    parameters = lte.optimizer.parameters.values()
    values, padding = sum(p.numel() for p in parameters), 64 * HEADS * len(parameters)
    assert 2 * moment_bytes(precision, values) <= held <= 2 * moment_bytes(precision, values + padding)
