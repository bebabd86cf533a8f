"""Nodes for tests on one machine: network namespaces with host names of their own, and what runs in them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "launchers"))

from emulate import Network  # noqa: E402
from parent_death import die_with_parent  # noqa: E402


def lacking(tools: Sequence[str]) -> str:
    """Which of `tools` this machine lacks, and root if it is needed; or nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    return ", ".join([*missing, *(["root"] if os.geteuid() else [])])


def die_with_us() -> None:
    """For `preexec_fn`: the child is killed when this process ends."""
    die_with_parent(signal.SIGKILL)


class Nodes:
    """`nodes` nodes named node0, node1, ... on links of 1 Gbit/s; `servers` are what every test finds there running."""

    def __init__(self, nodes: int) -> None:
        self.names = [f"node{node}" for node in range(nodes)]
        self.network = Network(nodes, mbit=1000)
        self.servers: list[subprocess.Popen[bytes]] = []

    def start(
        self, node: int, command: Sequence[str], environ: Mapping[str, str] | None = None, *, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Run `command` on a node's network, under its name. The process is that of `command` itself."""
        return subprocess.Popen(
            [*self.network.command(node), *command],
            cwd=cwd,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def cut(self, node: int) -> None:
        """Pull the node's cable."""
        subprocess.run(["ip", "link", "set", f"{self.network.bridge}{node}", "down"], check=True)

    def heal(self, node: int) -> None:
        """Put it back."""
        subprocess.run(["ip", "link", "set", f"{self.network.bridge}{node}", "up"], check=True)

    def processes(self, *words: str, node: int | None = None) -> dict[int, str]:
        """Commands by process id on all nodes or one, of those that hold all `words`; the servers left out."""
        servers = {server.pid for server in self.servers}
        found = {}
        for namespace in self.network.namespaces if node is None else [self.network.namespaces[node]]:
            for pid in map(int, subprocess.check_output(["ip", "netns", "pids", namespace], text=True).split()):
                try:
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if not servers & {pid, parent} and all(word in command for word in words):
                    found[pid] = command
        return found

    def kill(self, *words: str) -> int:
        """kill -9 of the processes whose command holds all `words`. Returns how many there were."""
        found = self.processes(*words)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)

    def wait_until_empty(self, seconds: float) -> dict[int, str]:
        """What is left on the nodes after at most so many seconds."""
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return left
