"""`lte-scale train`: from a configuration to a running trainer. Topology, device, process group, run directory."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import socket
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from lte_scale import log as logs
from lte_scale import quorum
from lte_scale.agreement import Disagreement
from lte_scale.collectives import Collectives
from lte_scale.config import check_topology, check_training, dump, load_config
from lte_scale.config.deepspeed import settings
from lte_scale.config.schema import Config
from lte_scale.engines import deepspeed
from lte_scale.metrics import writers
from lte_scale.run_dir import check_writable
from lte_scale.topology import Topology, from_environment
from lte_scale.trainer import Trainer, TrainingError
from lte_scale.tune import tuned

REFUSED, FAILED = 2, 3
_PR_SET_PDEATHSIG = 1
_REFUSAL = "lte/refusal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale train`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example merge.every=50")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")


def run(arguments: argparse.Namespace) -> int:
    """Check all that can be checked before a process group, file or accelerator is touched; then train.

    Returns 0, 2 if the run is refused, 3 if it failed for good after saving, or 128 + the signal that ended it.
    """
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        _end_with_agent()
        topology = from_environment(config.topology.heads_per_node, nodes_per_region=config.topology.nodes_per_region)
        check_training(config)
        check_topology(config, topology.nodes, topology.ranks_per_node)
        if config.engine.name == "deepspeed":
            deepspeed.check_installed()
        writers.check_installed(config.metrics)
        if config.fault_tolerance.enabled:
            quorum.check_installed()
        topology = topology.among(config.fault_tolerance)
    except ValueError:
        if int(os.environ.get("RANK", "0")) == 0:  # all ranks read the same configuration
            raise
        return REFUSED
    device = _device(config, topology)
    if topology.rank == 0:
        check_writable(Path(config.run_dir))
    return train(config, topology, device)


def _end_with_agent() -> None:
    """Have the kernel kill this rank when torchrun's agent is killed: it would train on, or wait for others, unseen."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def train(config: Config, topology: Topology, device: torch.device) -> int:
    """Train as this rank of the world. Collective."""
    # Longer than the watchdog's longest patience, which can say who is missing where a collective cannot.
    timeout = timedelta(seconds=max(600.0, 5 * config.watchdog.seconds))
    _init_process_group(topology, device, timeout)
    run_dir = Path(config.run_dir)
    try:
        logs.setup(topology.rank, run_dir, node=topology.node)
        collectives = Collectives(topology, timeout_seconds=timeout.total_seconds(), device=device)
        with ExitStack() as stack:
            try:
                config = tuned(config, collectives, device)
                trainer = stack.enter_context(Trainer(config, collectives, device))
                trainer.resume()
                if topology.rank == 0:
                    config = trainer.config
                    (run_dir / "config.yaml").write_text(dump(config))
                    if config.engine.name == "deepspeed":
                        (run_dir / "deepspeed.json").write_text(json.dumps(settings(config, topology), indent=2) + "\n")
                    _announce(config, topology, device)
                gc.freeze()  # what a run consists of stays: garbage collection need not look through it, rank by rank
                return trainer.run()
            except ValueError as error:
                if topology.rank == 0:
                    _get_default_store().set(_REFUSAL, str(error))
                if topology.rank == 0 or not _said_by_rank_0(error):
                    raise
                return REFUSED
    except Disagreement as error:
        logs.log.error("rank %d: %s", topology.rank, error)
        return FAILED
    except TrainingError as error:
        print(f"lte-scale: {error}", file=sys.stderr)
        return FAILED
    except ValueError:  # a refusal: said by the command line
        raise
    except Exception as error:
        # Dated, in events.log: of the many that follow when one rank fails, it tells the first.
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
        logs.log.error("on %s: %s", socket.gethostname(), first_line)
        raise
    finally:
        dist.destroy_process_group()


def _said_by_rank_0(error: ValueError) -> bool:
    """Whether rank 0 is refused for the same reason, so that one line is enough."""
    store = _get_default_store()
    try:
        store.wait([_REFUSAL], timedelta(seconds=5))
    except RuntimeError:  # rank 0 has nothing to say, or is gone
        return False
    return store.get(_REFUSAL).decode() == str(error)


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


def _init_process_group(topology: Topology, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # a plain python process: a world of one
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=topology.world_size)


def _announce(config: Config, topology: Topology, device: torch.device) -> None:
    logs.log.info(
        "%s on %d nodes x %d ranks (%s, %s): %d heads of rank %d, engine %s, base in scope %s, gathered per %s",
        config.model.name, topology.nodes, topology.ranks_per_node, device.type, config.train.precision,
        topology.heads, config.adapters.rank, config.engine.name, config.base.scope, config.base.gather,
    )  # fmt: skip
    if config.fault_tolerance.enabled:
        ft = config.fault_tolerance
        logs.log.info("this is node %d of %d, which merge by the lighthouse %s", ft.node, ft.nodes, ft.lighthouse)
