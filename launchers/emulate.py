#!/usr/bin/env python3
"""Run a job on this machine as K nodes of G ranks: one torchrun agent per node, as on a real cluster.

    launchers/emulate.py --nodes 2 --ranks-per-node 2 -- train configs/demo.yaml merge.every=50
    sudo launchers/emulate.py --nodes 2 --ranks-per-node 2 --link-mbit 100 -- train configs/demo.yaml

With --link-mbit every node is a network namespace whose link to the others carries so many Mbit/s; the bytes that left
each node by the kernel's counter are printed at the end. A first word that ends in .py runs that script instead of
lte_scale. Exit code: 0, or that of the first rank that failed. Ctrl-C and SIGTERM end all nodes, which save first.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

from parent_death import die_with_parent

GRACE_SECONDS = 25.0
MARK = "LTE_EMULATION"
ETC = Path("/etc/netns")


class Network:
    """K network namespaces on a bridge, each with a link of so many Mbit/s, or with `inf` as fast as the machine is.

    A context manager that leaves nothing behind.
    """

    def __init__(self, nodes: int, mbit: float) -> None:
        self.mbit, pid = mbit, os.getpid()
        self.bridge = f"lte{pid}b"
        self.namespaces = [f"lte{pid}n{node}" for node in range(nodes)]
        self.subnet = f"10.{78 + pid % 64}.{pid // 64 % 256}"

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node + 1}"

    def command(self, node: int) -> list[str]:
        # An own host name, or NCCL would take all nodes for one machine and pass the link by.
        name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"node{node}"]
        return ["ip", "netns", "exec", self.namespaces[node], *name]

    def __enter__(self) -> Network:
        remove_stale()
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("addr", "add", f"{self.subnet}.254/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            hosts = "".join(f"{self.address(node)} node{node}\n" for node in range(len(self.namespaces)))
            for node, namespace in enumerate(self.namespaces):
                veth = f"{self.bridge}{node}"
                _ip("netns", "add", namespace)
                # `ip netns exec` lays this file over /etc/hosts
                (ETC / namespace).mkdir(parents=True, exist_ok=True)
                (ETC / namespace / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
                _ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", namespace)
                _ip("link", "set", veth, "master", self.bridge, "up")
                _ip("-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", namespace, "link", "set", device, "up")
                if math.isfinite(self.mbit):
                    limit = ["tbf", "rate", f"{self.mbit:g}mbit", "burst", "256kb", "latency", "50ms"]
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root", *limit)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def bytes_sent(self, node: int) -> int:
        """What has left the node's interface, by the kernel's counter."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(subprocess.check_output([*self.command(node), "cat", path], text=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A namespace, and its end of the link, lives as long as a process in it: the links go first.
        for node, namespace in enumerate(self.namespaces):
            remove(f"{self.bridge}{node}")
            remove(namespace)
        remove(self.bridge)


def remove(name: str) -> None:
    """Delete a namespace or a link of an emulation, if it exists."""
    if (Path("/sys/class/net") / name).exists():
        _ip("link", "del", name, check=False)
    if (Path("/run/netns") / name).exists():
        _ip("netns", "del", name, check=False)
    shutil.rmtree(ETC / name, ignore_errors=True)


def remove_stale() -> None:
    """Delete what emulations left that were killed before they could."""
    for folder in (Path("/sys/class/net"), Path("/run/netns"), ETC):
        for name in sorted(path.name for path in folder.glob("lte*")):
            owner = re.fullmatch(r"lte(\d+)[bn]\d*", name)
            if owner and (int(owner[1]) == os.getpid() or not Path(f"/proc/{owner[1]}").exists()):
                remove(name)


def _ip(*words: str, check: bool = True) -> None:
    _run("ip", *words, check=check)


def _run(*words: str, check: bool = True) -> None:
    # An own session: Ctrl-C must not end the commands that set up and clean up.
    done = subprocess.run(words, capture_output=True, text=True, check=False, start_new_session=True)
    if check and done.returncode:
        sys.exit(f"emulate: {' '.join(words)}: {done.stderr.strip()}")


class Nodes:
    """The agents of all nodes, from start to the last process gone."""

    def __init__(self, arguments: argparse.Namespace, network: Network | None) -> None:
        self.arguments, self.network = arguments, network
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        self.asked_to_stop = 0
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        port = free_port()
        for node in range(self.arguments.nodes):
            prefix = self.network.command(node) if self.network else []
            address = self.network.address(0) if self.network else "127.0.0.1"
            command = [*prefix, sys.executable, __file__, "--agent", str(node), str(port), address, *self._size()]
            command += ["--", *self.arguments.command]
            # An own session: Ctrl-C on the terminal reaches this process alone, which then asks every node once.
            self.agents.append(
                subprocess.Popen(command, env=self._environment(), start_new_session=True, preexec_fn=die_with_parent)
            )

    def _size(self) -> list[str]:
        return [str(self.arguments.nodes), str(self.arguments.ranks_per_node)]

    def _environment(self) -> dict[str, str]:
        ranks = self.arguments.nodes * self.arguments.ranks_per_node
        defaults = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        # What the user has set names an interface of this machine, not of these nodes.
        interface = "eth0" if self.network else "lo"
        fixed = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, MARK: self.mark}
        inherited = {name: value for name, value in os.environ.items() if name != "RANK"}  # it tells ranks from agents
        return {**defaults, **inherited, **fixed}

    def wait(self) -> int:
        """Until every node has ended; the exit code of the first that failed."""
        code, deadline = 0, None
        while [agent for agent in self.agents if agent.poll() is None]:
            code = code or next((agent.returncode for agent in self.agents if agent.returncode), 0)
            if deadline is None and (code or self.asked_to_stop):
                deadline = time.monotonic() + GRACE_SECONDS
                self._signal(signal.SIGTERM)
            # An agent whose ranks have ended may still wait for another node's that failed, deaf to signals.
            if deadline is not None and (time.monotonic() > deadline or not self._processes("RANK")):
                self.kill()
            time.sleep(0.05)
        code = code or next((agent.returncode for agent in self.agents if agent.returncode), 0)
        if self.asked_to_stop:
            return 128 + self.asked_to_stop
        return code if code >= 0 else 128 - code

    def _signal(self, number: int) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.send_signal(number)

    def kill(self) -> None:
        """End every process of this emulation that is left, wherever it is in the tree, and see it gone."""
        deadline = time.monotonic() + 5
        while (left := self._processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _processes(self, variable: str = MARK) -> list[int]:
        """Process ids of this emulation whose environment has `variable`."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                entries = environ.read_bytes().split(b"\0")
                named = any(entry.startswith(f"{variable}=".encode()) for entry in entries)
                if named and f"{MARK}={self.mark}".encode() in entries:
                    found.append(int(environ.parent.name))
        return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def agent(words: Sequence[str]) -> int:
    """One node: torchrun in this process, without its tables of what the ranks have said already."""
    node, port, address, nodes, ranks = words[:5]
    command = list(words[words.index("--") + 1 :])
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)
    program = command if command[0].endswith(".py") else ["-m", "lte_scale", *command]
    try:
        torchrun(
            [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", f"--node-rank={node}", f"--master-addr={address}",
             f"--master-port={port}", "--max-restarts=0", *program]
        )  # fmt: skip
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, metavar="K", help="number of nodes")
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="G", help="ranks of each node")
    parser.add_argument(
        "--link-mbit",
        type=float,
        metavar="M",
        help="a link of so many Mbit/s for each node, inf for one without a limit (needs root, ip and tc)",
    )
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="train CONFIG [key=value ...]")
    arguments = parser.parse_args(words)
    if arguments.nodes < 1 or arguments.ranks_per_node < 1:
        parser.error(f"--nodes {arguments.nodes} --ranks-per-node {arguments.ranks_per_node}: both must be at least 1")
    if arguments.link_mbit is not None:
        if not arguments.link_mbit > 0:
            parser.error(f"--link-mbit {arguments.link_mbit:g}: must be above 0")
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing or os.geteuid() != 0:
            parser.error(f"--link-mbit needs {'the command ' + missing[0] if missing else 'root'}; leave it out")
    return arguments


def main() -> int:
    if sys.argv[1:2] == ["--agent"]:
        return agent(sys.argv[2:])
    arguments = parse(sys.argv[1:])
    network = Network(arguments.nodes, arguments.link_mbit) if arguments.link_mbit else None
    nodes = Nodes(arguments, network)

    def stop(number: int, frame: FrameType | None) -> None:
        nodes.asked_to_stop = number

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    if network is None:
        try:
            nodes.start()
            return nodes.wait()
        finally:
            nodes.kill()
    with network:
        try:
            nodes.start()
            code = nodes.wait()
            for node in range(arguments.nodes):
                print(f"node {node} sent {network.bytes_sent(node):,} bytes", flush=True)
            return code
        finally:
            nodes.kill()


if __name__ == "__main__":
    sys.exit(main())
