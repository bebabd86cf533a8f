"""A real Slurm for tests: munge, slurmctld and a slurmd per network namespace, fake GPUs; gone with its maker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.harness import free_port
from tests.nodes import Nodes, die_with_us, lacking

NEEDS = (
    "ip",
    "tc",
    "unshare",
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scancel",
    "scontrol",
    "sinfo",
    "squeue",
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_CONFIG = """
ClusterName=lte
SlurmctldHost=ctl({subnet}.254)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=8
KillWait={kill_wait}
MinJobAge=3600
JobRequeue=1
RequeueExit=85
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=100000 Gres=gpu:{gpus}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks for a cluster, or nothing."""
    return lacking(NEEDS)


class SlurmCluster(Nodes):
    """`nodes` nodes with `gpus` fake GPUs each. A context manager that leaves nothing behind."""

    def __init__(self, nodes: int = 2, gpus: int = 2, *, kill_wait: int = 20) -> None:
        super().__init__(nodes)
        # munge refuses a folder that others may write in.
        self.folder = Path(tempfile.mkdtemp(prefix="lte-slurm-", dir="/run"))
        self.folder.chmod(0o755)
        self.gpus, self.kill_wait = gpus, kill_wait
        self.environ = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environ["PATH"] += ":/usr/sbin:/sbin"
        self.slurmds: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self.network.__enter__()
            self._configure()
            self._serve("munged", self._munge())
            controller = ["unshare", "--uts", "sh", "-c", 'hostname ctl; exec slurmctld -D -c -f "$0"']
            self._serve("slurmctld", [*controller, self.environ["SLURM_CONF"]])
            for node in range(len(self.names)):
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _configure(self) -> None:
        folder, last = self.folder, len(self.names) - 1
        for name in ("state", "spool", "log", "dev"):
            (folder / name).mkdir()
        # Slurm wants device files for GPUs and looks at nothing but their names; these are all /dev/null.
        for gpu in range(self.gpus):
            os.mknod(folder / "dev" / f"nvidia{gpu}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            f"NodeName=node[0-{last}] Name=gpu File={folder}/dev/nvidia[0-{self.gpus - 1}]\n"
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={self.network.address(node)}"
            for node, name in enumerate(self.names)
        )
        (folder / "slurm.conf").write_text(
            _CONFIG.format(
                folder=folder,
                port=free_port(),
                subnet=self.network.subnet,
                gpus=self.gpus,
                nodes=nodes,
                kill_wait=self.kill_wait,
            )
        )

    def _munge(self) -> list[str]:
        for name, mode in (("munge-private", 0o700), ("munge", 0o755)):
            (self.folder / name).mkdir(mode=mode)
            shutil.chown(self.folder / name, "munge", "munge")
        key = self.folder / "munge-private" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
        private = self.folder / "munge-private"
        return [
            "setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "munged", "--foreground",
            f"--socket={self.folder}/munge/socket", f"--key-file={key}", f"--pid-file={self.folder}/munge/pid",
            f"--log-file={private}/log", f"--seed-file={private}/seed",
        ]  # fmt: skip

    def _serve(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            server = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_us,
            )  # fmt: skip
        self.servers.append(server)
        return server

    def start_node(self, node: int) -> None:
        """Start the slurmd of a node."""
        command = ["slurmd", "-D", "-f", self.environ["SLURM_CONF"], "-N", self.names[node]]
        self.slurmds[node] = self._serve(f"slurmd{node}", [*self.network.command(node), *command])

    def lose_node(self, node: int) -> None:
        """End all that runs on a node at once, as its power supply would."""
        self.slurmds[node].kill()
        for pid in self.processes(node=node):
            os.kill(pid, 9)
        self.slurmds[node].wait()

    def start_lost_nodes(self) -> None:
        """Power on again what was lost."""
        for node, server in self.slurmds.items():
            if server.poll() is not None:
                self.start_node(node)

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Until all nodes are idle."""
        until = time.monotonic() + seconds
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "gpu", "-o", "%N", check=False).split()) < len(
            self.names
        ):
            assert time.monotonic() < until, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)

    def run(
        self, *words: str, check: bool = True, environ: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run a client command; what it prints."""
        done = subprocess.run(
            words,
            env={**self.environ, **(environ or {})},
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, cwd: Path, *words: str, environ: Mapping[str, str] | None = None) -> int:
        """sbatch in `cwd`; the job's number."""
        return int(self.run("sbatch", "--parsable", *words, environ=environ, cwd=cwd))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number))))

    def wait_for_end(self, number: int, seconds: float) -> str:
        """The state in which a job ends."""
        until = time.monotonic() + seconds
        while (state := self.job(number)["JobState"]) not in ENDED or self.job(number).get("Requeue_pending"):
            assert time.monotonic() < until, f"job {number} is {state} after {seconds} s"
            time.sleep(0.3)
        return state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self.servers:
            server.kill()
            server.wait()
        self.servers.clear()
        self.kill()
        self.network.__exit__(None, None, None)
        shutil.rmtree(self.folder)
