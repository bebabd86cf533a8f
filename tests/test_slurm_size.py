"""slurm/vit_l_64gpu.sh as it stands, on a real Slurm of 8 nodes with 8 (fake) GPUs each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.nodes import ROOT
from tests.slurm_cluster import SlurmCluster, missing

SCRIPT = ROOT / "slurm" / "vit_l_64gpu.sh"
LACKS = missing()

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(bool(LACKS), reason=f"needs {LACKS}")]


def test_64_ranks_as_the_script_asks_for_them(tmp_path: Path) -> None:
    """Not one option on the command line: 8 nodes of 8 GPUs, and what each of them would run."""
    with SlurmCluster(nodes=8, gpus=8) as cluster:
        environ = {"DRY_RUN": "1", "DATA": "/data/imagenet", "VENV": str(Path(sys.executable).parent.parent)}
        number = cluster.submit(
            ROOT, f"--output={tmp_path}/job.out", str(SCRIPT), f"run_dir={tmp_path / 'run'}", environ=environ
        )
        assert cluster.wait_for_end(number, 60) == "COMPLETED"
        lines = (tmp_path / "job.out").read_text().splitlines()
    assert len(lines) == 8
    for node, line in enumerate(sorted(lines)):
        assert line.startswith(f"node{node}: ranks {8 * node} to {8 * node + 7} of 64, rendezvous node0:")
        assert line.endswith(
            f"{ROOT}/launchers/torchrun.sh train {ROOT}/configs/vit_l_64gpu.yaml "
            f"data.train=/data/imagenet/train data.val=/data/imagenet/val run_dir={tmp_path / 'run'}"
        )
