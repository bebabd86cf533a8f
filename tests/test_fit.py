"""`plan --fit`: what is found fits by the prediction and the next does not, and a real step stays within it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lte_scale.assemble import adapt
from lte_scale.cli import main
from lte_scale.config import load_config
from lte_scale.config.schema import Config
from lte_scale.estimate import Traces
from lte_scale.fit import MARGIN, Fit, fit, largest
from lte_scale.live import LiveBytes

MODEL = [
    "model.image_size=28",
    "model.channels=1",
    "model.num_classes=7",
    "model.arguments={patch_size: 7, embed_dim: 24, depth: 2, num_heads: 2}",
    "adapters.rank=4",
    "train.batch_size=8",
]


@pytest.fixture(scope="module")
def traces() -> Traces:
    return Traces(config())


def config(*overrides: str) -> Config:
    return load_config(None, [*MODEL, *overrides])


def total(traces: Traces, config: Config, nodes: int = 2, ranks_per_node: int = 2) -> int:
    return traces.memory(traces.arrangement(config, nodes=nodes, ranks_per_node=ranks_per_node)).total


def fitting(traces: Traces, config: Config, limit: float, nodes: int = 2, ranks_per_node: int = 2) -> Fit:
    return fit(config, traces, nodes=nodes, ranks_per_node=ranks_per_node, gigabytes=limit / 1e9, margin=0)


PEAKS: list[Callable[[int], int]] = [
    lambda n: 100 + 7 * n,
    lambda n: 100 + max(7 * n, 30 * n - 9000),  # another moment of the step becomes the peak
    lambda n: 100 + 5000 * (n // 256),  # steps, as of an allocator
    lambda n: 100 + n * n,
]


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("limit", [50, 100, 106, 107, 1000, 9000, 40_000, 10**9])
@pytest.mark.parametrize("guess", [1, 64, 3000])
def test_the_search_ends_where_the_next_does_not_fit(peak: Callable[[int], int], limit: int, guess: int) -> None:
    asked: list[int] = []

    def counted(n: int) -> int:
        asked.append(n)
        return peak(n)

    found = largest(counted, limit, most=4096, guess=guess)
    assert found == max((n for n in range(1, 4097) if peak(n) <= limit), default=0)
    assert len(asked) == len(set(asked)) <= 32


def test_along_a_line_four_traces_are_enough() -> None:
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) or 100 + 7 * n, 1000, most=4096, guess=64) == 128  # type: ignore[func-returns-value]
    assert len(asked) <= 4


@pytest.mark.parametrize("overrides", [[], ["train.checkpoint_activations=true"], ["augment.mixup=0.8"]])
def test_the_found_batch_fits_and_the_next_does_not(traces: Traces, overrides: list[str]) -> None:
    asked = config(*overrides)
    found = fitting(traces, asked, 4e6)
    assert found.batch and found.next_batch
    unit = 2 if asked.augment.mixup else 1
    images, following = (int(c.options[0].partition("=")[2]) for c in (found.batch, found.next_batch))
    assert following == images + unit
    assert images % unit == 0
    assert found.batch.peak == total(Traces(asked), config(*overrides, f"train.batch_size={images}")) <= 4e6
    assert found.next_batch.peak == total(traces, config(*overrides, f"train.batch_size={following}")) > 4e6
    assert found.batch.largest[0] == "activations"


def test_memory_grows_with_the_batch(traces: Traces) -> None:
    for overrides in ([], ["train.checkpoint_activations=true"], ["train.precision=fp32"]):
        peaks = [total(traces, config(*overrides, f"train.batch_size={n}")) for n in range(1, 20, 3)]
        assert peaks == sorted(set(peaks))


def test_ranks_that_share_a_head_share_its_images(traces: Traces) -> None:
    found = fitting(traces, config("topology.heads_per_node=1"), 2e6)
    assert found.batch
    assert int(found.batch.options[0].partition("=")[2]) % 2 == 0


def test_the_fewest_gpus(traces: Traces) -> None:
    asked = config("topology.heads_per_node=6")
    peaks = {ranks: total(traces, asked, 2, ranks) for ranks in (1, 2, 3, 6)}
    assert peaks[1] > peaks[2] > peaks[3] > peaks[6]
    found = fitting(traces, asked, peaks[3])
    assert found.ranks and found.ranks.options == ("--ranks-per-node 3",)
    assert found.ranks.peak == peaks[3]
    assert found.ranks.heads == 12
    assert fitting(traces, asked, 1000).ranks is None


def test_one_base_over_all_nodes_shrinks_with_them(traces: Traces) -> None:
    asked = config("base.scope=global", "train.batch_size=1", "merge.path=dense")
    peaks = {nodes: total(traces, asked, nodes, 1) for nodes in (1, 2, 4)}
    found = fitting(traces, asked, peaks[4], 1, 1)
    assert found.nodes
    nodes = int(found.nodes.options[0].split()[1])
    assert found.nodes.peak <= peaks[4] and all(peak > peaks[4] for n, peak in peaks.items() if n < nodes)


def test_switches_help_and_are_predicted_as_if_configured(traces: Traces) -> None:
    asked = config("base.gather=window", "train.batch_size=64", "train.precision=fp32")
    before = total(traces, asked)
    found = fitting(traces, asked, before / 2)
    assert not found.configured.fits
    # Two blocks are gathered at a time, and there are no more: base.gather=pass holds as much.
    assert {switch.options[0].partition("=")[0] for switch in found.switches} == {
        "train.batch_size",
        "train.precision",
        "train.checkpoint_activations",
        "base.scope",
        "base.offload",
        "base.precision",
    }
    for switch in found.switches:
        changed = load_config(
            None, [*MODEL, "base.gather=window", "train.batch_size=64", "train.precision=fp32", *switch.options]
        )
        assert switch.peak == total(traces, changed) < before
        assert switch.fits == (switch.peak <= before / 2)
        assert changed.train.batch_size * changed.train.accumulate == 64
    assert any(switch.fits for switch in found.switches) == (found.together is None)
    assert fitting(traces, asked, before).switches == []


def test_switches_go_together_where_none_is_enough(traces: Traces) -> None:
    asked = config("base.gather=window", "train.precision=fp32")
    least = min(switch.peak for switch in fitting(traces, asked, 1000).switches)
    all_of_them = fitting(traces, asked, 1000).together
    assert all_of_them and not all_of_them.fits
    found = fitting(traces, asked, least - 1).together
    assert found and found.fits
    assert all_of_them.peak <= found.peak < least


def test_a_switch_that_is_refused_says_why(traces: Traces) -> None:
    found = fitting(traces, config("merge.every=50", "merge.local_every=10"), 1000)
    refused = [switch for switch in found.switches if switch.refused]
    assert [switch.options[0] for switch in refused] == ["base.scope=global"]
    assert "merge.local_every" in refused[0].refused


def really_held(asked: Config, heads: int) -> int:
    """The most bytes alive in a process that trains `asked` for a window and merges."""
    size = asked.train.batch_size * heads
    images, labels = torch.randn(size, 1, 28, 28), torch.randint(0, 7, (size,))
    with LiveBytes([images, labels]) as live:
        lte = adapt(asked, 7)
        for step in range(1, 3):
            with lte.autocast:
                logits = lte.model(images).float()
            losses = F.cross_entropy(logits, labels, reduction="none").view(heads, -1).mean(1)
            losses.sum().backward()
            lte.optimizer.step(losses.detach())
            if lte.merger.due(step):
                lte.merger.merge(step)
    return live.peak


@pytest.mark.parametrize(("heads", "checkpointed"), [(1, "false"), (3, "true")])
def test_a_real_run_with_the_found_batch_stays_within_the_memory(heads: int, checkpointed: str) -> None:
    same = ["engine=none", f"topology.heads_per_node={heads}", "merge.every=2", "train.precision=fp32"]
    same += [f"train.checkpoint_activations={checkpointed}"]
    asked, memory = config(*same), 6e6
    found = fit(asked, Traces(asked), nodes=1, ranks_per_node=1, gigabytes=memory / 1e9, margin=MARGIN)
    assert found.batch
    assert found.batch.peak > 0.95 * found.limit
    held = really_held(config(*same, *found.batch.options), heads)
    assert held == pytest.approx(found.batch.peak, rel=0.05)
    assert held < memory


FILE = """
model: {name: vit_tiny_patch16_224, num_classes: 7, image_size: 28, channels: 1,
        arguments: {patch_size: 14, embed_dim: 24, depth: 2, num_heads: 2}}
train: {batch_size: 8}
merge: {local_every: 10}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., int]:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return lambda *options: main(["plan", str(path), "--ranks-per-node", "2", *options])


def test_the_command_prints_what_it_puts_into_json(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--fit", "0.001", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["fit"]
    assert found["limit"] == pytest.approx(1e6 * (1 - MARGIN))
    assert not found["configured"]["fits"]
    assert plan("--fit", "0.001") == 0
    page = capsys.readouterr().out
    assert "Within 0.001 GB" in page
    for choice in (found["batch"], *found["switches"]):
        if choice:
            assert " ".join(choice["options"]) in page
    assert max(map(len, page.splitlines())) <= 150


@pytest.mark.parametrize(
    "options", [["--fit", "0"], ["--fit", "nan"], ["--margin", "1", "--fit", "8"], ["--margin", "0.2"]]
)
def test_the_command_refuses_in_one_line(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert plan(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lte-scale: {options[0]}: ")
    assert error.count("\n") == 1
