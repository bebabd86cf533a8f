"""Reading a hostfile, and whether its nodes can be reached: every mistake is one line that says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CONNECT_SECONDS = 5
FORM = "write one line per node, like 'node1 slots=8' (see launchers/hostfile.example)"


def read(path: Path) -> dict[str, int]:
    """Slots by node, in the order of the file.

    Raises:
        ValueError: naming the file and the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ValueError(
            f"hostfile {path}: cannot be read ({reason}); name another with --hostfile, or {FORM}"
        ) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"hostfile {path}, line {number}, '{line}'"
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s.*)?", line)
        if not found:
            raise ValueError(f"{where}: no name and slots; {FORM}")
        name, count = found[1], int(found[2])
        if count == 0:
            raise ValueError(f"{where}: a node needs at least one slot; give its number of GPUs, or leave out the line")
        if name in slots:
            raise ValueError(f"{where}: node {name} is there already; name every node once")
        if slots and count != next(iter(slots.values())):
            first = next(iter(slots))
            raise ValueError(
                f"{where}: {count} slots, but {first} has {slots[first]}; give all nodes the same number of slots"
            )
        slots[name] = count
    if not slots:
        raise ValueError(f"hostfile {path}: names no node; {FORM}")
    return slots


def check_reachable(nodes: Sequence[str], ssh_port: int | None = None) -> None:
    """Log in to every node, to all at once.

    Raises:
        ValueError: naming the first node that does not answer, with what ssh says.
    """
    for tool, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(tool) is None:
            raise ValueError(
                f"{tool} is not installed on this machine (package {package}); install it, "
                "or start every node by itself with --no_ssh"
            )
    port = ["-p", str(ssh_port)] if ssh_port else []
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *port]
    calls = {
        node: subprocess.Popen(
            ["ssh", *options, node, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in nodes
    }
    failed: dict[str, str] = {}
    for node, call in calls.items():
        try:
            _, said = call.communicate(timeout=3 * CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            call.kill()
            said = f"no answer within {3 * CONNECT_SECONDS} s"
        if call.returncode != 0:
            failed[node] = (said.strip().splitlines() or [f"exit code {call.returncode}"])[-1].strip()
    if failed:
        first = next(iter(failed))
        others = f" (nor {', '.join(list(failed)[1:])})" if len(failed) > 1 else ""
        raise ValueError(
            f"node {first}{others} cannot be reached: {failed[first]}; `ssh {first} true` must work without a "
            "password, or take the node out of the hostfile"
        )
