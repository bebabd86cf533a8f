"""`lte-scale report`: curves and a comparison of runs, as a picture and as one self-contained HTML page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lte_scale.report.page import document
from lte_scale.report.picture import picture
from lte_scale.report.runs import labels, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `lte-scale report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where report.html and report.png go (the first RUN)")


def run(args: argparse.Namespace) -> int:
    """Write the report of `args.runs` and say where it is.

    Raises:
        ValueError: if a run lacks its configuration or metrics, if they are damaged, or if nothing can be written.
    """
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    runs = [load(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    out: Path = args.out or args.runs[0]
    files = {"report.png": picture(runs), "report.html": document(runs).encode(errors="replace")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _publish(out / name, content)
    except OSError as error:
        raise ValueError(f"cannot write to {out} ({error.strerror}); name another directory with --out") from error
    for name in files:
        print(f"wrote {out / name}")
    return 0


def _publish(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
