"""Which checkpoints a run directory holds: the whole ones, the newest, the best, the one that a path names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import cast

from lte_scale import checksums
from lte_scale.contents import read_state
from lte_scale.log import log

_NAME = re.compile(r"step_(\d{8,})")


def check_writable(run_dir: Path) -> None:
    """Create the run directory and prove that it can be written.

    Raises:
        ValueError: if it cannot.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = run_dir / "checkpoints" / ".probe"
        probe.write_text("written\n")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot write {run_dir} ({error.strerror}); choose a directory you may write"
        ) from error


def named_checkpoints(run_dir: Path) -> list[Path]:
    """What has the name of a checkpoint of the run, oldest first. A save names it last: what lacks files is torn."""
    folder = run_dir / "checkpoints"
    if not os.path.isdir(folder):  # pathlib's own would raise for a name too long
        return []
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints that have the files of one, oldest first."""
    return [path for path in named_checkpoints(run_dir) if _is_whole(path)]


def step_of(path: Path) -> int:
    """The step that a checkpoint is named after."""
    return int(path.name.removeprefix("step_"))


def _is_whole(path: Path) -> bool:
    return all(os.path.isfile(path / name) for name in (".metadata", "train_state.json", checksums.LIST))


def resolve(location: str) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a run; a newer, torn one is told.

    Raises:
        ValueError: if there is none.
    """
    path = Path(location)
    if _is_whole(path):
        return path
    if found := whole_checkpoints(path):
        for torn in (named for named in named_checkpoints(path) if step_of(named) > step_of(found[-1])):
            log.warning("%s lacks files of a checkpoint; using %s", torn, found[-1].name)
        return found[-1]
    siblings = whole_checkpoints(path.parent.parent) or whole_checkpoints(path.parent)
    hint = f"the newest of its run is {siblings[-1]}" if siblings else "name a run directory or one of its checkpoints"
    raise ValueError(f"{location}: no checkpoint; {hint}")


def candidates(run_dir: Path, resume: str) -> list[Path]:
    """The checkpoints that `resume` may mean, the first to try first: `auto` (the run's own), `never`, or a path.

    Raises:
        ValueError: if a path names none.
    """
    if resume == "never":
        return []
    return named_checkpoints(run_dir)[::-1] if resume == "auto" else [resolve(resume)]


def best_checkpoint(run_dir: Path) -> Path:
    """The run's checkpoint with the best eval_top1.

    Raises:
        ValueError: if none was evaluated.
    """
    scored = [(top1, path) for path in whole_checkpoints(run_dir) if (top1 := _top1(path)) is not None]
    if not scored:
        raise ValueError(f"{run_dir}: no checkpoint with an evaluation; leave out --best")
    return max(scored)[1]


def _top1(path: Path) -> float | None:
    try:
        return cast("float | None", read_state(path)["top1"])
    except ValueError:  # one that is damaged does not hide the best of the others
        return None
