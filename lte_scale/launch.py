"""From a configuration to a running trainer: topology, device, process group, run directory."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lte_scale import log as logs
from lte_scale.checkpoint import check_writable
from lte_scale.collectives import Collectives
from lte_scale.config import check_topology, check_training, dump
from lte_scale.config.schema import Config
from lte_scale.topology import Topology, from_environment
from lte_scale.trainer import Trainer, TrainingError

TRAINING_FAILED = 3
_TIMEOUT = timedelta(minutes=10)


def train(config: Config) -> int:
    """Run the training that `config` describes, as the rank the environment says. Returns the exit code.

    Raises:
        ValueError: for what a user can mend.
    """
    topology = from_environment(config.topology.heads_per_node)
    check_training(config)
    check_topology(config, topology.nodes, topology.ranks_per_node)
    run_dir = Path(config.run_dir)
    if topology.rank == 0:
        check_writable(run_dir)
    device = _device(config, topology)
    _init_process_group(topology, device)
    try:
        collectives = Collectives(topology, timeout_seconds=_TIMEOUT.total_seconds())
        logs.setup(topology.rank, run_dir, node=topology.node)
        if topology.rank == 0:
            (run_dir / "config.yaml").write_text(dump(config))
            _announce(config, topology, device)
        with Trainer(config, collectives, device) as trainer:
            trainer.resume()
            return trainer.run()
    except TrainingError as error:
        print(f"lte-scale: {error}", file=sys.stderr)
        return TRAINING_FAILED
    finally:
        dist.destroy_process_group()


def _device(config: Config, topology: Topology) -> torch.device:
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        return torch.device("cpu")
    if topology.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"train.device: rank {topology.rank} needs GPU {topology.local_rank}, this node has "
            f"{torch.cuda.device_count()}; start fewer ranks per node or set train.device=cpu"
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    return device


def _init_process_group(topology: Topology, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:  # a plain python process: a world of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=topology.world_size)


def _announce(config: Config, topology: Topology, device: torch.device) -> None:
    logs.log.info(
        "%s with %d heads on %d x %d ranks (%s), base %s sharded in scope %s, merge every %d steps",
        config.model.name, topology.heads, topology.nodes, topology.ranks_per_node, device.type,
        config.engine.name, config.base.scope, config.merge.every,
    )
