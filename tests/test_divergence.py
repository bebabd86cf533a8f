"""A head that diverges is left out of the merge, starts again from the base, and the others do not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_scale.cli import main
from lte_scale.config.methods import translated
from lte_scale.config.schema import AdaptersConfig, Config, EngineConfig, MergeConfig, TopologyConfig, TrainConfig
from lte_scale.divergence import Divergence
from lte_scale.run_dir import whole_checkpoints
from lte_scale.trainer import Trainer
from tests.dist.equality import Run
from tests.reference import CLASSES, TINY, head_batch
from tests.test_train import SMALL, command, records, tensors

HEADS, EVERY, BAD = 3, 4, 1
CPU = torch.device("cpu")


def configuration(mode: str = "reset", **merge: Any) -> Config:
    config = Config(
        model=TINY,
        adapters=AdaptersConfig(rank=3, alpha=6, mode=mode),
        topology=TopologyConfig(heads_per_node=HEADS),
        engine=EngineConfig(name="none"),
        train=TrainConfig(precision="fp32"),
        merge=MergeConfig(every=EVERY, **merge),
    )
    return translated(config)


def judge(run: Run, ratio: float = 2.0) -> Divergence:
    return Divergence(run.merger, run.optimizer, run.collectives, ratio=ratio, classes=CLASSES, device=CPU)


def deltas(run: Run, head: int) -> dict[str, Tensor]:
    """What the head has learned since the last merge, by weight."""
    found = {}
    for name, layer in run.heads.linears.items():
        found[name] = layer.scale * layer.B[head].detach() @ layer.A[head].detach()
        if layer.A_prev is not None and layer.B_prev is not None:
            found[name] -= layer.scale * layer.B_prev[head] @ layer.A_prev[head]
    return found


@pytest.mark.parametrize("mode", ["reset", "resetless"])
def test_the_merge_is_that_of_the_others(mode: str) -> None:
    run = Run(configuration(mode))
    divergence = judge(run)
    for step in range(1, 2 * EVERY):  # past a merge, so that resetless has something to go back to
        run.step(step)
    masters = {name: value.clone() for name, value in run.merger.outer.masters.items()}
    replicas = {name: value.clone() for name, value in run.merger.replicas.outer.masters.items()}
    sound = [head for head in range(HEADS) if head != BAD]
    learned = [deltas(run, head) for head in sound]
    moved = {n: p.detach().view(HEADS, -1)[sound].clone() for n, p in run.heads.replicas.items()}
    with torch.no_grad():
        for parameter in run.heads.parameters().values():
            parameter[BAD].mul_(1e30)
    divergence.follow(torch.tensor([1.0, 1e3, 1.0]))
    (found,) = divergence.before_merge(2 * EVERY)
    assert found.head == BAD
    assert not found.hopeless
    run.merger.merge(2 * EVERY)
    for name, before in masters.items():
        wanted = before + torch.stack([d[name] for d in learned]).sum(0).flatten() / HEADS
        torch.testing.assert_close(run.merger.outer.masters[name], wanted, rtol=1e-5, atol=1e-7)
    for name, before in replicas.items():
        wanted = (moved[name].sum(0) + before.flatten()) / HEADS
        torch.testing.assert_close(run.merger.replicas.outer.masters[name].flatten(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("within", [0, 2])
def test_it_computes_what_the_base_computes(mode: str, within: int) -> None:
    """Right after a merge and in the middle of a window; its next steps are as cautious as its last ones."""
    run = Run(configuration(mode))
    divergence = judge(run)
    for step in range(1, EVERY + 1 + within):
        run.step(step)
    before = {name: p.detach()[BAD].clone() for name, p in run.heads.factor_parameters().items()}
    divergence.withdraw(BAD, EVERY + within, "")
    images = head_batch(0, 0, 5)[0]
    with torch.no_grad():
        logits = run.engine.model(images.repeat(HEADS, 1, 1, 1)).view(HEADS, 5, -1)[BAD]
        with run.merger.merged():
            torch.testing.assert_close(logits, run.engine.model(images), rtol=1e-5, atol=1e-5)
    if mode == "reset":
        changed = [name for name, value in before.items() if not value.equal(run.heads.factor_parameters()[name][BAD])]
        assert len([name for name in changed if name.endswith(".A")]) == len(run.heads.linears)
    for parameter in run.optimizer.parameters.values():
        moments = {name: value.view(HEADS, -1) for name, value in run.optimizer.moments(parameter).items()}
        assert not moments["exp_avg"][BAD].any()
        assert within == 0 or moments["exp_avg"][0].any()


def test_only_what_multiplies_is_withdrawn() -> None:
    run = Run(configuration())
    divergence = judge(run)
    steady = torch.full((HEADS,), 1.0)
    for _ in range(50):
        divergence.follow(steady)
    assert divergence.before_merge(4) == []
    divergence.follow(steady * 3)  # one bad batch
    assert divergence.before_merge(8) == []
    for _ in range(20):
        divergence.follow(torch.tensor([1.0, 4.0, float("nan")]))
    assert [found.head for found in divergence.before_merge(12)] == [1]
    run.optimizer.skipped_in_a_row = [0, 1, 2]
    (found,) = divergence.before_merge(16)
    assert (found.head, found.reason) == (2, "its loss or gradient is not finite")
    assert run.optimizer.skipped_in_a_row == [0, 1, 0]


def test_small_losses_may_multiply() -> None:
    divergence = judge(Run(configuration()))
    for loss in (1e-3, 1e-1, 0.4):
        for _ in range(100):
            divergence.follow(torch.full((HEADS,), loss))
        assert divergence.before_merge(4) == []


def test_hopeless_after_three_windows_with_hardly_a_sound_one() -> None:
    divergence = judge(Run(configuration()))
    told = []
    for wild in (True, True, False, True, True, True):
        for _ in range(50):
            divergence.follow(torch.tensor([1.0, 1.0, 50.0 if wild else 1.0]))
        told += [found.hopeless for found in divergence.before_merge(4)]
    assert told == [False, False, False, True, True]


def test_off() -> None:
    run = Run(configuration())
    divergence = judge(run, ratio=0)
    for _ in range(50):
        divergence.follow(torch.full((HEADS,), 1e3))
    assert divergence.before_merge(4) == []


def test_a_run_with_a_head_that_explodes(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends well, tells of it, and resumed in the window before it ends with the same weights."""
    step_of = Trainer.train_step

    def exploding(trainer: Trainer) -> None:
        if trainer.state.step == 18:
            with torch.no_grad():
                for layer in trainer.heads.linears.values():
                    layer.B[BAD].mul_(1e4)
        step_of(trainer)

    monkeypatch.setattr(Trainer, "train_step", exploding)
    words = [*SMALL, "engine=none", "base.gather=pass", "merge={every: 8, local_every: 8}", "topology.heads_per_node=3",
             "data.workers=0", "checkpoint={every: 5, keep_last: 10}"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(digits, whole, *words, "train.duration=40")) == 0
    events = (whole / "events.log").read_text()
    assert f"step 24: head {BAD} withdrawn, its loss" in events
    assert events.count("withdrawn") == 1
    assert records(whole)[-1]["loss"] < 2.4
    assert main(command(digits, parts, *words, "train.duration=40")) == 0
    for checkpoint in whole_checkpoints(parts):
        if int(checkpoint.name.removeprefix("step_")) > 20:  # after the explosion, before the merge
            for file in sorted(checkpoint.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            checkpoint.rmdir()
    assert main(command(digits, parts, *words, "train.duration=40")) == 0
    ours, theirs = tensors(whole_checkpoints(parts)[-1]), tensors(whole_checkpoints(whole)[-1])
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
