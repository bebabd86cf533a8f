"""The command line: lte-scale train | plan | preflight | shards | eval | export | top | report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lte_scale import __version__

USER_ERROR = 2

# Command: module, its functions that add arguments and run, help. A module is imported only for its own command.
COMMANDS = {
    "train": ("lte_scale.launch", "add_arguments", "run", "pre-train a vision transformer with LTE"),
    "plan": ("lte_scale.plan", "add_arguments", "run", "memory per rank, bytes per merge, chosen paths; needs no data"),
    "preflight": ("lte_scale.preflight", "add_arguments", "run", "check every node before a run, in under a minute"),
    "shards": ("lte_scale.shards", "add_arguments", "run", "write WebDataset shards from images"),
    "eval": ("lte_scale.export", "add_eval_arguments", "run_eval", "accuracy of the merged weights of a run"),
    "export": ("lte_scale.export", "add_export_arguments", "run_export", "merged weights as safetensors for timm"),
    "top": ("lte_scale.top", "add_arguments", "run", "the live state of a run, from its endpoints"),
    "report": (
        "lte_scale.report",
        "add_arguments",
        "run",
        "a page on runs: curves, time, bytes, heads, events; HTML and PNG",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. An error that the user can mend ends with one message and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="lte-scale", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lte-scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in words[:1]:
            getattr(import_module(module), add)(command)
            command.set_defaults(run=getattr(import_module(module), run))
    arguments, left = parser.parse_known_args(words)
    # argparse takes no positional words after options, people write `plan CONFIG --nodes 8 merge.every=50`
    if left and not (hasattr(arguments, "overrides") and all("=" in w and not w.startswith("-") for w in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        if os.environ.get("LTE_TRACEBACK"):
            raise
        print(f"lte-scale: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # `lte-scale plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
