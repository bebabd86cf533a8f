"""The command line: `lte-scale train | plan | shards | eval | export | report`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from lte_scale import __version__
from lte_scale.config import Config, check_topology, check_training, dump, load_config

USER_ERROR = 2
TRAINING_FAILED = 3


def parser() -> argparse.ArgumentParser:
    """All commands; the modules behind them are imported only when they run."""
    top = argparse.ArgumentParser(prog="lte-scale", description=__doc__)
    top.add_argument("--version", action="version", version=f"lte-scale {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="pre-train a vision transformer with LTE")
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example merge.every=50")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    train.set_defaults(run=run_train)
    for name in ("plan", "shards", "eval", "export", "report"):
        _add(commands, name)
    return top


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    if name == "plan":
        from lte_scale import plan

        plan.add_arguments(commands.add_parser(name, help="memory per rank, bytes per merge, paths; needs no data"))
    elif name == "shards":
        from lte_scale import shards

        shards.add_arguments(commands.add_parser(name, help="write WebDataset shards"))
    elif name == "report":
        from lte_scale import report

        report.add_arguments(commands.add_parser(name, help="curves of one or more runs, PNG and HTML"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Errors that a user can mend end with one message and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        if os.environ.get("LTE_TRACEBACK"):
            raise
        print(f"lte-scale: {error}", file=sys.stderr)
        return USER_ERROR


def run_train(arguments: argparse.Namespace) -> int:
    """`lte-scale train`: everything that can be refused is refused before a process group or a file exists."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    from lte_scale.launch import train

    return train(config)
