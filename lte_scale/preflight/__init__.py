"""`lte-scale preflight`: what a run needs of every node, checked in under a minute before the first step.

One process per node, with the variables of launchers/torchrun.sh:

    NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 lte-scale preflight CONFIG [key=value ...]

NODE_NAMES, the host names of all nodes in order, lets a node that never reports be named. Node 0 speaks for all, its
last line names the node and the reason. Exit code on every node: 0, 2 for a configuration that is refused, 3 otherwise.

    place       this node among the others; the store at node 0 where they meet
    local       what a node checks by itself
    compare     what differs between nodes, who caused a failure, and how it is said
    ranks       one rank of the all-reduce, a process of its own
    supervise   a node's ranks, from start to the last one gone
    command     all of it in order
"""

from __future__ import annotations

import argparse
import os

DEADLINE_SECONDS = 40.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale preflight`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example run_dir=/shared/run")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEADLINE_SECONDS,
        metavar="SECONDS",
        help="how long node 0 waits for the reports of all nodes; a node's own checks and the all-reduce get three "
        f"quarters of it ({DEADLINE_SECONDS:g})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check this node with all others. Returns 0, 2 if the configuration is refused, 3 if a node does not pass.

    Raises:
        ValueError: on node 0, if the configuration or the variables are refused.
    """
    # Read when torch is loaded. A peer that is gone is said here in one line, not by torch in twenty.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lte_scale.preflight.command import run as check

    return check(arguments)
