"""Every optimizer of the heads against plain torch AdamW, and their common state."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lte_scale.adam import IntegerSteps, build_adam, choose
from lte_scale.assemble import LTE, assemble
from lte_scale.checkpoint import Checkpoints
from lte_scale.collectives import Collectives
from lte_scale.config.schema import (
    AdaptersConfig,
    CheckpointConfig,
    Config,
    EngineConfig,
    OptimizerConfig,
    TopologyConfig,
    TrainConfig,
)
from lte_scale.contents import Pieces, tensors_of
from lte_scale.model import Heads, attach, build
from lte_scale.optim import HeadOptimizer
from lte_scale.topology import Topology
from tests.reference import CLASSES, TINY

HEADS = 3
SETTINGS = OptimizerConfig(lr=3e-3, replica_lr=1e-3, weight_decay=0.1, clip_norm=0.5)


def why_not(name: str, device: str) -> str:
    """Why a test of this optimizer is skipped."""
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if name == "deepspeed" and device == "cuda" and not shutil.which("nvcc"):
        return "needs nvcc, to compile DeepSpeed's FusedAdam"
    try:
        choose(name, torch.device(device))
    except ValueError as error:
        return str(error)
    return ""


def case(name: str, device: str) -> Any:
    reason = why_not(name, device)
    marks = [pytest.mark.skipif(bool(reason), reason=reason)]
    marks += [pytest.mark.gpu] if device == "cuda" else []
    marks += [pytest.mark.deepspeed] if name == "deepspeed" else []
    return pytest.param(name, torch.device(device), marks=marks, id=f"{name}-{device}")


ALL = [case("adamw", "cpu"), case("deepspeed", "cpu")] + [case(n, "cuda") for n in ("adamw", "apex", "deepspeed")]


def new_heads(device: torch.device, count: int = HEADS) -> Heads:
    heads = attach(build(TINY, CLASSES, seed=0), AdaptersConfig(rank=3, alpha=6), range(count), seed=0)
    for parameter in heads.parameters().values():
        parameter.data = parameter.data.to(device)
    return heads


def new_optimizer(name: str, device: torch.device, count: int = HEADS) -> HeadOptimizer:
    world = Collectives(Topology(nodes=1, ranks_per_node=1, heads_per_node=count))
    return HeadOptimizer(new_heads(device, count), replace(SETTINGS, name=name), world)


def gradients(heads: Heads, step: int) -> dict[str, Tensor]:
    """Of every parameter, [H, -1], small in the first step and clipped in later ones."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (1e-4 if step == 1 else 1e-2)
        * torch.randn(len(heads.ids), p.numel() // len(heads.ids), generator=generator)
        for name, p in heads.parameters().items()
    }


def close(actual: Tensor, wanted: Tensor, name: str, rtol: float = 1e-5) -> None:
    scale = wanted.abs().max().item()
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * scale, msg=lambda m: f"{name}: {m}")


class Separately:
    """Plain torch AdamW, every head with an optimizer of its own."""

    def __init__(self, heads: Heads, *, counts_on: bool) -> None:
        self.counts_on = counts_on
        self.factors, count = heads.factor_parameters().keys(), len(heads.ids)
        self.parameters = [
            {name: nn.Parameter(p.detach().cpu().view(count, -1)[h].clone()) for name, p in heads.parameters().items()}
            for h in range(count)
        ]
        self.adams = [AdamW([self.group(n, p) for n, p in own.items()], foreach=False) for own in self.parameters]

    def group(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        if name in self.factors:
            return {"params": [parameter], "peak": SETTINGS.lr, "weight_decay": SETTINGS.weight_decay}
        return {"params": [parameter], "peak": SETTINGS.replica_lr, "weight_decay": 0.0}

    def step(self, gradients: dict[str, Tensor], skipped: int | None, rate: Callable[[float], float]) -> None:
        for head, (own, adam) in enumerate(zip(self.parameters, self.adams, strict=True)):
            if head == skipped:  # unless one kernel skips it, its steps count on, as those of others do beside it
                for state in adam.state.values():
                    state["step"] += self.counts_on
                continue
            for name, parameter in own.items():
                parameter.grad = gradients[name][head].clone()
            nn.utils.clip_grad_norm_(list(own.values()), SETTINGS.clip_norm)
            for group in adam.param_groups:
                group["lr"] = rate(group["peak"])
            adam.step()

    def restart(self, policy: str) -> None:
        for own, adam in zip(self.parameters, self.adams, strict=True):
            for name, parameter in own.items():
                if policy == "reset" or (policy == "reset_b" and name in self.factors and name.endswith(".B")):
                    adam.state.pop(parameter)


@pytest.mark.parametrize("policy", ["keep", "reset", "reset_b"])
@pytest.mark.parametrize(("name", "device"), ALL)
@pytest.mark.parametrize("count", [1, HEADS])
def test_equals_plain_adamw(name: str, device: torch.device, policy: str, count: int) -> None:
    optimizer = new_optimizer(name, device, count)
    expected = Separately(optimizer.heads, counts_on=not optimizer.fused)
    late = optimizer.flags.arrived is not None and optimizer.fused
    expected_flags = [[False] * count] * late
    for step in range(1, 10):
        skipped = count // 2 if step in (3, 7) else None
        losses = torch.ones(count, device=device)
        given = gradients(optimizer.heads, step)
        for key, parameter in optimizer.parameters.items():
            parameter.grad = given[key].view_as(parameter).to(device)
        if skipped is not None:
            losses[skipped] = float("nan")
        rate = lambda peak, step=step: peak / step  # noqa: E731
        _, was_skipped = optimizer.step(losses, rate)
        expected_flags.append([head == skipped for head in range(count)])
        assert was_skipped == expected_flags[step - 1]
        expected.step(given, skipped, rate)
        if step == 5:
            optimizer.restart(policy)
            expected.restart(policy)
    for head in range(count):
        for key, wanted in expected.parameters[head].items():
            parameter = optimizer.parameters[key]
            state = expected.adams[head].state[wanted]
            close(parameter.detach().cpu().view(count, -1)[head], wanted.detach(), key)
            # With beta2 in fp32, (1 - beta2) g^2 is 1.3e-5 less; the bias correction has the same error and undoes it.
            for kind, rtol in (("exp_avg", 1e-5), ("exp_avg_sq", 2e-5)):
                moment = optimizer.moments(parameter)[kind].cpu().view(count, -1)[head]
                close(moment, state[kind], f"{key} {kind}", rtol)
            assert optimizer.adam.state[parameter]["step"] == state["step"]


def new_run(name: str, device: torch.device, moments: str = "fp32") -> tuple[LTE, Pieces]:
    config = Config(
        model=TINY,
        adapters=AdaptersConfig(rank=3, alpha=6),
        topology=TopologyConfig(heads_per_node=HEADS),
        engine=EngineConfig(name="none"),
        train=TrainConfig(precision="fp32"),
        optimizer=replace(SETTINGS, name=name, moments=moments),
    )
    lte = assemble(config, CLASSES, Collectives(Topology(nodes=1, ranks_per_node=1, heads_per_node=HEADS)), device)
    return lte, Pieces(lte.heads, lte.merger, lte.optimizer, dict.fromkeys(range(HEADS), 0))


def train(lte: LTE, steps: range, skipped: int | None = None) -> None:
    """`skipped`: the head whose loss is not finite in all of them."""
    for step in steps:
        for key, value in gradients(lte.heads, step).items():
            parameter = lte.optimizer.parameters[key]
            parameter.grad = value.view_as(parameter).to(parameter.device)
        losses = torch.ones(HEADS, device=parameter.device)
        if skipped is not None:
            losses[skipped] = float("nan")
        lte.optimizer.step(losses)


def everything(pieces: Pieces) -> dict[str, Tensor]:
    with pieces.opened() as shards:
        return {k: v.detach().cpu().clone() for k, v in tensors_of(pieces, shards).items() if k.startswith("head/")}


@pytest.mark.parametrize(("name", "device"), ALL)
@pytest.mark.parametrize("policy", ["keep", "reset_b"])
@pytest.mark.parametrize("direction", ["from_adamw", "to_adamw", "same"])
def test_checkpoints_are_any_optimizers(
    tmp_path: Path, name: str, device: torch.device, direction: str, policy: str
) -> None:
    """The state is restored bit for bit by all of them. The same one then goes on bit for bit, another one closely."""
    first, then = {"from_adamw": ("adamw", name), "to_adamw": (name, "adamw"), "same": (name, name)}[direction]
    lte, pieces = new_run(first, device)
    train(lte, range(1, 30))
    lte.optimizer.restart(policy)
    train(lte, range(30, 33))
    saved = everything(pieces)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), lte.merger.collectives)
    (tmp_path / "checkpoints").mkdir()
    checkpoints.save(pieces, {"step": 32}, "text\n", top1=None, wait=True)

    other, resumed = new_run(then, device)
    found = checkpoints.find("auto")
    assert found is not None
    checkpoints.load(found, resumed)
    checkpoints.close()
    restored = everything(resumed)
    assert restored.keys() == saved.keys() and all(torch.equal(restored[key], saved[key]) for key in saved)
    assert {int(v) for k, v in restored.items() if k.endswith(".B/step")} == {3 if policy == "reset_b" else 32}

    train(lte, range(33, 40))
    train(other, range(33, 40))
    went_on = everything(pieces)
    for key, value in everything(resumed).items():
        if first == then:
            assert torch.equal(value, went_on[key]), key
        else:
            close(value, went_on[key], key, 2e-5)


class CountsByGroup(Optimizer):
    """AdamW with the step count that apex's FusedAdam keeps: one integer in every group."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in (p for p in group["params"] if p.grad is not None):
                m, v = self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]
                m.lerp_(parameter.grad, 0.1)
                v.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** group["step"]), v / (1 - 0.999 ** group["step"])
                parameter.data.addcdiv_(m_hat, v_hat.sqrt() + 1e-8, value=-group["lr"])


def test_steps_counted_by_group_are_those_of_the_state() -> None:
    """Parameters without a gradient do not count, and a count set from outside, as on resuming, is the next one."""
    start = [torch.randn(4) for _ in range(3)]
    mine, wanted = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    plain = AdamW([{"params": wanted[:2]}, {"params": wanted[2:]}], lr=0.1, weight_decay=0.0, foreach=False)
    optimizer = CountsByGroup([{"params": mine[:2]}, {"params": mine[2:]}], {"lr": 0.1})
    steps = IntegerSteps(optimizer).steps
    for parameter in mine:
        zeros = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
        optimizer.state[parameter] = {"step": steps[parameter], **zeros}
    for step in range(6):
        for parameters in (mine, wanted):
            for index in (0, 2):  # parameter 1 is unused
                parameters[index].grad = torch.sin(torch.arange(4.0) + step)
        if step == 3:
            optimizer.state[mine[2]]["step"].zero_()
            plain.state[wanted[2]]["step"].zero_()
        optimizer.step()
        plain.step()
    assert [float(optimizer.state[p]["step"]) for p in mine] == [6, 0, 3]
    torch.testing.assert_close([p.detach() for p in mine], [p.detach() for p in wanted])


@pytest.mark.parametrize(("name", "device"), [case("deepspeed", "cpu")])
def test_auto_takes_what_is_compiled(name: str, device: torch.device) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    groups = [{"params": [parameter], "weight_decay": 0.0}]
    build_adam(name, groups, betas=(0.9, 0.999), eps=1e-8, device=device)  # compiles where that has not been done
    assert choose("auto", device) == name
