"""SHA-256 of every file of a checkpoint, in a list that `sha256sum --check` reads too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LIST = "SHA256SUMS"
WRITTEN_ONCE = (".metadata", "train_state.json", "config.yaml")
"""Files that every checkpoint has, beside those of its ranks."""
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\s]+)")


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a folder, by name.

    Raises:
        OSError: if one cannot be read.
    """
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def listed(found: Mapping[str, str]) -> str:
    """The list of `digests` as text."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))


def damage(folder: Path, *, share: int = 0, shares: int = 1) -> str:
    """What is wrong with the files of a checkpoint, or nothing: of every `shares`-th file, from number `share` on."""
    if not os.path.isdir(folder):
        return "it is no directory"
    try:
        lines = (folder / LIST).read_text().splitlines()
        expected = {}
        for line in lines:
            if not (found := _LINE.fullmatch(line)):
                return f"{LIST} is no list of SHA-256 sums"
            expected[found[2]] = found[1]
        if not expected:
            return f"{LIST} is empty"
        if unlisted := [name for name in WRITTEN_ONCE if name not in expected]:
            return f"{LIST} does not list {unlisted[0]}"
        for name in sorted(expected)[share::shares]:
            if digests(folder, [name])[name] != expected[name]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read: {error}"
    return ""
