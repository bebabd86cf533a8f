"""Print what the pyproject.toml beside this file, or above it, requires: one requirement a line.

python3 requirements.py [--extra NAME ...] [--without PACKAGE ...]
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def project() -> dict[str, object]:
    path = next(folder / "pyproject.toml" for folder in (HERE, HERE.parent) if (folder / "pyproject.toml").exists())
    table: dict[str, object] = tomllib.loads(path.read_text())["project"]
    return table


def package(requirement: str) -> str:
    """The name in a requirement: torch of torch>=2.14."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", nargs="+", default=[], metavar="NAME", help="extras of the project")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="packages to leave out")
    arguments = parser.parse_args()
    table = project()
    required, extras = table["dependencies"], table["optional-dependencies"]
    assert isinstance(required, list) and isinstance(extras, dict)
    lines = [*required]
    for extra in arguments.extra:
        if extra not in extras:
            parser.error(f"--extra {extra}: pyproject.toml has {', '.join(extras)}")
        lines += extras[extra]
    missing = set(arguments.without) - {package(line) for line in lines}
    if missing:
        parser.error(f"--without {' '.join(sorted(missing))}: not required")
    print("\n".join(line for line in lines if package(line) not in arguments.without))


if __name__ == "__main__":
    main()
