"""`lte-scale train`: from a configuration to a running trainer. Topology, device, process group, run directory."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lte_scale import log as logs
from lte_scale.checkpoint import check_writable
from lte_scale.collectives import Collectives
from lte_scale.config import check_topology, check_training, dump, load_config
from lte_scale.config.schema import Config
from lte_scale.topology import Topology, from_environment
from lte_scale.trainer import Trainer, TrainingError

REFUSED, FAILED = 2, 3
_TIMEOUT = timedelta(minutes=10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale train`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example merge.every=50")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")


def run(arguments: argparse.Namespace) -> int:
    """Check all that can be checked before a process group, file or accelerator is touched; then train.

    Returns 0, 2 if the run is refused, 3 if it failed for good after saving, or 128 + the signal that ended it.
    What is refused is refused by all ranks alike: rank 0 alone says why.
    """
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        topology = from_environment(config.topology.heads_per_node)
        check_training(config)
        check_topology(config, topology.nodes, topology.ranks_per_node)
        device = _device(config, topology)
        if topology.rank == 0:
            check_writable(Path(config.run_dir))
    except ValueError:
        if int(os.environ.get("RANK", "0")) == 0:
            raise
        return REFUSED
    return train(config, topology, device)


def train(config: Config, topology: Topology, device: torch.device) -> int:
    """Train as this rank of the world. Collective."""
    _init_process_group(topology, device)
    run_dir = Path(config.run_dir)
    try:
        logs.setup(topology.rank, run_dir, node=topology.node)
        collectives = Collectives(topology, timeout_seconds=_TIMEOUT.total_seconds())
        try:
            trainer = Trainer(config, collectives, device)
        except ValueError:
            if topology.rank == 0:
                raise
            return REFUSED
        with trainer:
            if topology.rank == 0:
                (run_dir / "config.yaml").write_text(dump(config))
                _announce(config, topology, device)
            trainer.resume()
            return trainer.run()
    except TrainingError as error:
        print(f"lte-scale: {error}", file=sys.stderr)
        return FAILED
    finally:
        dist.destroy_process_group()


def _device(config: Config, topology: Topology) -> torch.device:
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
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
        "%s on %d nodes x %d ranks (%s): %d heads of rank %d, engine %s, base in scope %s, gathered per %s",
        config.model.name, topology.nodes, topology.ranks_per_node, device.type, topology.heads,
        config.adapters.rank, config.engine.name, config.base.scope, config.base.gather,
    )  # fmt: skip
