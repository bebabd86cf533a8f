"""Parts of a run killed at random moments, again and again: it ends with the weights of one that nobody disturbed.

    KILLS=25 SEED=7 make test-faults

Twice KILLS kills (2 nodes of 2 ranks, 4 nodes of 1), of a rank, an agent, the launcher or everything, while starting,
training, merging, evaluating or saving.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from lte_scale.cli import main
from lte_scale.run_dir import whole_checkpoints
from tests.kills import KILLS, SEED, Kills
from tests.test_train import SMALL, command, tensors

RUN = [*SMALL, "merge={every: 8, local_every: 4}", "train.duration=80", "train.accumulate=2", "data.workers=1"]
RUN += ["checkpoint.every=4", "evaluate.every=8"]

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 2), (4, 1)])
def test_random_kills(tmp_path: Path, nodes: int, ranks_per_node: int) -> None:
    data = tmp_path / "data"
    assert main(["shards", "digits", str(data)]) == 0

    def emulated(name: str) -> Kills:
        run_dir = tmp_path / name
        return Kills(command(data, run_dir, *RUN), run_dir, nodes, ranks_per_node, random.Random(SEED))

    whole, killed = emulated("whole"), emulated("killed")
    whole.run(0, within_seconds=0)
    killed.run(KILLS, within_seconds=2.0)
    recoveries = sorted(killed.recovery_seconds)
    print(f"\nseed {SEED}: killed {dict(Counter(killed.what))}, back at a new step after {recoveries} s")
    assert len(killed.what) == KILLS
    assert killed.left == 0, "processes outlived their launcher"
    ours, theirs = (tensors(whole_checkpoints(run.run_dir)[-1]) for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
