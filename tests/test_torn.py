"""The newest checkpoint torn in every way we could think of: `resume=auto` says in one line what is wrong with it, and
takes the last whole one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from lte_scale.checksums import LIST, WRITTEN_ONCE
from lte_scale.run_dir import named_checkpoints
from tests.saver import Run, equal

FILES = [*WRITTEN_ONCE, "__0_0.distcp", LIST]
NEWEST = "step_00000006"


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def tear(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))

    return tear


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("a file\n")


def a_link_to_nowhere(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("elsewhere")


def a_directory(checkpoint: Path) -> None:
    (checkpoint / "train_state.json").unlink()
    (checkpoint / "train_state.json").mkdir()


def unlisted(checkpoint: Path) -> None:
    lines = (checkpoint / LIST).read_text().splitlines(keepends=True)
    (checkpoint / LIST).write_text("".join(lines[:-1]))


def of_the_one_before(checkpoint: Path) -> None:
    shutil.copy(checkpoint.with_name("step_00000004") / "__0_0.distcp", checkpoint)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a bit flipped": flipped,
    "zeros": lambda content: bytes(len(content)),  # what a power failure leaves of a file that was not synced
}
# How it is torn, and what the line must name.
TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    # A sum of the list that has changed is not its file's.
    f"{name} {how}": (rewritten(name, change), "" if name == LIST else f"{name} is not as it was written")
    for name in FILES
    for how, change in CHANGES.items()
    if (name, how) != (LIST, "a byte less")  # a list without its last newline is whole
}
TORN |= {
    f"without {name}": (lambda path, name=name: (path / name).unlink(), f"{name} is missing")  # type: ignore[misc]
    for name in FILES
}
TORN |= {
    "no JSON": (rewritten("train_state.json", lambda content: b"{"), "train_state.json is not as it was written"),
    "a list of something else": (rewritten(LIST, lambda content: b"{}\n"), "is no list of SHA-256 sums"),
    "a list that lacks its last line": (unlisted, f"{LIST} does not list train_state.json"),
    "tensors of another step": (of_the_one_before, "__0_0.distcp is not as it was written"),
    "a directory for a file": (a_directory, "train_state.json"),
    "an empty directory": (emptied, f"{LIST} is missing"),
    "a file": (a_file, "it is no directory"),
    "a link to nowhere": (a_link_to_nowhere, "it is no directory"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run with three checkpoints, and the masters of the second."""
    saver = Run(tmp_path_factory.mktemp("runs") / "three", keep_last=3)
    masters = {}
    for step in (2, 4, 6):
        saver.train(2)
        saver.save(step)
        masters[step] = saver.masters()
    return saver.checkpoints.run_dir, masters[4]


def find_says(run_dir: Path, caplog: pytest.LogCaptureFixture) -> tuple[Run, Path | None, list[str]]:
    run = Run(run_dir)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lte_scale"):
        found = run.checkpoints.find("auto")
    return run, found, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("how", TORN)
def test_the_last_whole_one_is_taken_and_what_is_wrong_is_told(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / NEWEST
    tear, names = TORN[how]
    tear(newest)
    run, found, told = find_says(tmp_path, caplog)
    assert found == newest.with_name("step_00000004")
    assert len(told) == 1 and told[0].startswith(f"{newest} is damaged: "), told
    assert names in told[0] and "\n" not in told[0]
    run.load(found)
    assert equal(run.masters(), saved[1])
    with pytest.raises(ValueError, match=rf"resume: .*{NEWEST}") as refusal:
        run.checkpoints.find(str(newest))
    assert "\n" not in str(refusal.value)


def test_two_torn_in_a_row_are_told_one_by_one(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    oldest, middle, newest = named_checkpoints(tmp_path)
    (middle / ".metadata").unlink()
    (newest / "__0_0.distcp").write_bytes(b"")
    _, found, told = find_says(tmp_path, caplog)
    assert found == oldest
    assert [line.split(" is damaged: ")[0] for line in told] == [str(newest), str(middle)]


def test_what_a_save_had_not_finished_is_no_checkpoint(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / NEWEST
    shutil.copytree(newest, newest.with_name(".tmp-step_00000008"))
    _, found, told = find_says(tmp_path, caplog)
    assert (found, told) == (newest, [])


@pytest.mark.parametrize("how", ["__0_0.distcp emptied", "without .metadata", "an empty directory", "a file"])
def test_a_run_whose_checkpoints_are_all_torn_does_not_begin_anew(
    saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, how: str
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    for path in named_checkpoints(tmp_path):
        TORN[how][0](path)
    run = Run(tmp_path)
    with pytest.raises(ValueError, match=r"resume: all 3 checkpoints in .* are damaged; set resume=never"):
        run.checkpoints.find("auto")
    assert run.checkpoints.find("never") is None


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Gives up root's rights, which no file is closed to, until the test ends."""
    if os.geteuid() != 0:
        yield lambda: None
        return
    above = [path for path in tmp_path.parents if path.stat().st_uid == 0]
    modes = {path: path.stat().st_mode for path in above}
    for path in above:
        path.chmod(modes[path] | 0o111)
    yield lambda: os.seteuid(65534)
    os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.mark.parametrize("closed", ["", "__0_0.distcp"])
def test_one_that_may_not_be_read_is_told(
    saved: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    closed: str,
    as_nobody: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o755)
    (tmp_path / "checkpoints" / NEWEST / closed).chmod(0)
    as_nobody()
    _, found, told = find_says(tmp_path, caplog)
    assert found is not None and found.name == "step_00000004"
    assert len(told) == 1 and f"{NEWEST} is damaged: it cannot be read: " in told[0] and "Permission denied" in told[0]
