"""What a clean root takes over from this machine: how it reaches the network, apt's archive and pip's index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Files that pip's configuration names are copied to here.
FILES = "/run/outside"
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def debian(suite: str, root: Path) -> None:
    """A minimal Debian, from the archive and with the settings that this machine's apt has."""
    files = [
        path for suffix in ("list", "sources") for path in sorted(Path("/etc/apt").glob(f"**/sources*/*.{suffix}"))
    ]
    files += Path("/etc/apt").glob("sources.list")
    sources = [str(path) for path in files if suite in path.read_text().split()]
    settings = subprocess.check_output(["apt-config", "dump", "Acquire"], text=True)
    # mmdebstrap has values of its own for what it downloads in which format.
    wanted = re.findall(r'^(Acquire::(?:Check|http|https|Retries)\S* ".+");$', settings, re.MULTILINE)
    options = [f"--aptopt={setting}" for setting in wanted]
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *options, suite, str(root), *sources]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mmdebstrap: {done.stderr}")


def mount(root: Path) -> None:
    """What a container finds mounted: /proc, /sys, /dev, and the name servers of its host."""
    for words in (
        ["-t", "proc", "proc", f"{root}/proc"],
        ["-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys"],
        ["-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev"],
    ):
        _run("mount", *words)
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / device).touch()
        _run("mount", "--bind", f"/dev/{device}", f"{root}/dev/{device}")
    for name, target in {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        (root / "dev" / name).symlink_to(target)
    (root / "dev" / "shm").mkdir()
    _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/dev/shm")
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    (root / "etc" / "hosts").write_text(f"127.0.0.1 localhost {os.uname().nodename}\n")


def environment(root: Path) -> dict[str, str]:
    """The variables by which pip and others reach the network in the root as this machine does.

    pip's whole configuration goes as PIP_* variables. Files that it names are copied into the root; folders are mounted
    there at their own path, read-only, those of a file: URL with the folder above, as an index lies beside its files.
    """
    variables = {name: os.environ[name] for name in PROXIES if name in os.environ}
    listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    # The later line is the stronger: files first, this machine's PIP_* variables last.
    for name, value in re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", _env_last(listed), re.MULTILINE):
        words = [_carry(word, root) for word in value.replace("\\n", " ").split()]
        variables["PIP_" + name.upper().replace("-", "_")] = " ".join(words)
    return variables


def _env_last(listed: str) -> str:
    return "\n".join(sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")))


def _carry(word: str, root: Path) -> str:
    """A word of pip's configuration, as it must read in the root."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return word
    if path.is_file():
        copy = root / FILES.lstrip("/") / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        return f"{FILES}/{path.name}"
    _bind(path.parent if word.startswith("file://") else path, root)
    return word


def _bind(path: Path, root: Path) -> None:
    target = root / str(path.resolve()).lstrip("/")
    if target.exists():  # mounted already, or a folder that Debian has
        return
    target.mkdir(parents=True)
    _run("mount", "--bind", str(path), str(target))
    _run("mount", "-o", "remount,bind,ro", str(target))


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
