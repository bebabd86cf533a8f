"""Nodes for tests of launchers that log in: network namespaces with an sshd each, a root that may go from one to all.

A node has its own network, host name, /etc/hosts, /etc/ssh and process ids. Nothing of this machine's ssh is used or
changed, and all of it ends with the process that made it.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.nodes import ROOT, Nodes, die_with_us, lacking

# ETC is of launchers/, which tests.nodes puts on the path
from emulate import ETC  # isort: skip

__all__ = ["ROOT", "Cluster", "missing"]

NEEDS = ("ip", "tc", "ssh", "ssh-keygen", "sshd", "pdsh", "pkill", "unshare")
SSHD_EMPTY = Path("/run/sshd")
_CLIENT = """
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
"""
_SERVER = """
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
"""


def missing() -> str:
    """What this machine lacks for a cluster, or nothing."""
    return lacking(NEEDS)


class Cluster(Nodes):
    """`nodes` nodes named node0, node1, ... A context manager that leaves nothing behind.

    Attributes:
        hostfile: names the nodes with `slots` slots each.
    """

    def __init__(self, folder: Path, nodes: int = 2, slots: int = 2) -> None:
        super().__init__(nodes)
        self.folder = folder
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        self.made: list[Path] = []

    def __enter__(self) -> Cluster:
        try:
            for key in ("key", "host_key"):
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
                subprocess.run(words, check=True)
            if not SSHD_EMPTY.exists():  # where sshd puts itself away until a client has logged in
                SSHD_EMPTY.mkdir()
                self.made = [SSHD_EMPTY]
            self.network.__enter__()
            for node, namespace in enumerate(self.network.namespaces):
                etc = ETC / namespace / "ssh"  # `ip netns exec` lays this over /etc/ssh
                etc.mkdir()
                (etc / "ssh_config").write_text(_CLIENT.format(folder=self.folder))
                (etc / "sshd_config").write_text(_SERVER.format(folder=self.folder))
                self.servers.append(self._serve(node))
            self._wait_for_servers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _serve(self, node: int) -> subprocess.Popen[bytes]:
        # Process ids of its own: DeepSpeed ends its agents by name, and would end those of other jobs here.
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*self.network.command(node), *alone, str(shutil.which("sshd", path="/usr/sbin:/sbin")), "-D", "-e"]
        with (self.folder / f"sshd{node}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_us,
            )

    def _wait_for_servers(self) -> None:
        until = time.monotonic() + 20
        for name in self.names:
            while self.start(0, ["ssh", name, "true"]).wait():
                assert time.monotonic() < until, (self.folder / f"sshd{name[4:]}.log").read_text()
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self.servers:  # with it every process that has its process ids
            server.kill()
            server.wait()
        self.kill()  # what was started here and not through sshd
        self.network.__exit__(None, None, None)
        for path in self.made:
            path.rmdir()
