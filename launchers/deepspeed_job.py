"""Start a job with DeepSpeed's launcher on the nodes of a hostfile, and see it ended on all of them.

    launchers/deepspeed.sh [--hostfile FILE] [options] train CONFIG [key=value ...]

Ctrl-C and SIGTERM reach every rank once: all save and end after the same step, and this process after them. It ends
the job of this hostfile and port alone, where DeepSpeed itself would end every DeepSpeed job on these nodes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hostfile
from parent_death import die_with_parent

REFUSED = 2
SCRIPT = Path(__file__).resolve().with_name("train.py")
AGENT = f"^{re.escape(sys.executable)} -u -m deepspeed\\.launcher\\.launch "
# DeepSpeed's agents give their ranks 30 s to end.
GRACE_SECONDS = 60.0
PASSED_ON = ("PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_", "NCCL_", "TORCH_", "LTE_")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options before `train`, and the words from there on."""
    environ = os.environ
    start = list(words).index("train") if "train" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="launchers/deepspeed.sh",
        usage="%(prog)s [options] train CONFIG [key=value ...]",
        description="Options of DeepSpeed's launcher. Others it has: docs/deepspeed.md, the plain command.",
    )
    parser.add_argument("-H", "--hostfile", default=environ.get("HOSTFILE"), metavar="FILE", help="or HOSTFILE")
    parser.add_argument("--master_addr", default=environ.get("MASTER_ADDR", ""), help="or MASTER_ADDR; default: node 0")
    parser.add_argument("--master_port", type=int, default=environ.get("MASTER_PORT", "29500"), help="or MASTER_PORT")
    parser.add_argument("--ssh_port", type=int, help="port of sshd on the nodes")
    parser.add_argument("--no_ssh", action="store_true", help="start this node alone, the others in the same way")
    parser.add_argument(
        "--node_rank", type=int, default=environ.get("NODE_RANK", "-1"), help="or NODE_RANK: this node, from 0"
    )
    arguments = parser.parse_args(words[:start])
    if len(words) < start + 2:
        parser.error("after the options: train CONFIG [key=value ...]")
    return arguments, list(words[start:])


def check(arguments: argparse.Namespace, command: Sequence[str]) -> dict[str, int]:
    """All that can be known before anything starts. Returns the slots by node.

    Raises:
        ValueError: with the one line to say.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"deepspeed is not installed for {sys.executable}; pip install 'lte-scale[deepspeed]'")
    if arguments.hostfile is None:
        raise ValueError(f"no hostfile: name one with --hostfile or HOSTFILE, and {hostfile.FORM}")
    slots = hostfile.read(Path(arguments.hostfile))
    if not Path(command[1]).is_file():
        raise ValueError(f"configuration {command[1]}: no such file; give train the path of a YAML file")
    for path in environment_files():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not re.match(r"\s*\w+\s*=", line):
                raise ValueError(f"{path}, line {number}, '{line}': not NAME=value; one variable a line, nothing else")
    if not arguments.no_ssh:
        hostfile.check_reachable(list(slots), arguments.ssh_port)
    elif not 0 <= arguments.node_rank < len(slots):
        raise ValueError(
            f"--node_rank {arguments.node_rank}: with --no_ssh say which node this is, 0 to {len(slots) - 1} "
            f"in the order of {arguments.hostfile}, by --node_rank or NODE_RANK"
        )
    return slots


def environment_files() -> list[Path]:
    """The user's own, where DeepSpeed looks for them."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for path in dict.fromkeys((Path.home() / name, Path(name))) if path.is_file()]


def environment_file() -> int:
    """A file in memory, gone with its readers: what the ranks take over from here, then what the user's files say."""
    taken = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and "\n" not in value}
    passed = [f"{name}={value}" for name, value in taken.items()]
    chosen = [line for path in environment_files() for line in path.read_text().splitlines()]
    descriptor = os.memfd_create("deepspeed_env", 0)
    os.write(descriptor, "".join(f"{line}\n" for line in [*passed, *chosen]).encode())
    return descriptor


def quoted(word: str) -> str:
    """As the shell of a node must read it, past pdsh and what DeepSpeed does to words with spaces."""
    word = word.replace("%", "%%")
    if " " not in word:
        return shlex.quote(word)
    return re.sub(r"([\\$`])", r"\\\1", word)  # DeepSpeed puts double quotes around it


class Job:
    """DeepSpeed's launcher and, through it or by pdsh, this job's agents on the nodes."""

    def __init__(self, arguments: argparse.Namespace, nodes: Sequence[str]) -> None:
        self.arguments, self.first = arguments, nodes[0]
        self.nodes = {nodes[arguments.node_rank]} if arguments.no_ssh else set(nodes)  # that are ours to end
        self.asked_to_stop = 0

    def start(self, command: Sequence[str]) -> None:
        arguments = self.arguments
        options = [f"--hostfile={arguments.hostfile}", f"--master_port={arguments.master_port}"]
        if arguments.no_ssh:
            options += ["--no_ssh", f"--node_rank={arguments.node_rank}"]
            options += [f"--master_addr={arguments.master_addr or self.first}"]
        else:
            options += ["--force_multi", "--no_ssh_check"]
            options += [f"--master_addr={arguments.master_addr}"] if arguments.master_addr else []
            options += [f"--ssh_port={arguments.ssh_port}"] if arguments.ssh_port else []
            command = [quoted(word) for word in command]
        file = environment_file()
        # An own session: Ctrl-C on the terminal reaches this process alone, which then asks every node once.
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *options, str(SCRIPT), *command],
            env={**os.environ, "DS_ENV_FILE": f"/dev/fd/{file}"},
            stdin=subprocess.DEVNULL,
            pass_fds=[file],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        os.close(file)

    def wait(self) -> int:
        """Until every node has ended; DeepSpeed's exit code, or 128 + the signal that ended it."""
        untold = set(self.nodes)
        while self.launcher.poll() is None:
            if self.asked_to_stop and untold:  # once each, and a node that is still starting when it has started
                untold -= self.on_nodes("pkill -TERM {} && echo %h", untold)
            time.sleep(0.1)
        code = self.launcher.returncode
        if code:  # perhaps of the launcher alone
            self.on_nodes("pkill -TERM {0}; while pgrep {0} >/dev/null; do sleep 0.2; done", self.nodes)
        if self.asked_to_stop:
            return 128 + self.asked_to_stop
        return code if code >= 0 else 128 - code

    def on_nodes(self, action: str, nodes: set[str]) -> set[str]:
        """Run `action` with this job's agents as what it selects. Returns the nodes that echo their name, %h."""
        if self.arguments.no_ssh:
            selected = f"-g {self.launcher.pid} -f '{AGENT}'"
            shell = ["sh", "-c", action.replace("%h", "".join(nodes)).format(selected)]
        else:
            selected = f"-f '{AGENT}.* --master_port={self.arguments.master_port} .*{re.escape(str(SCRIPT))} '"
            shell = ["pdsh", "-R", "ssh", "-N", "-f", "1024", "-w", ",".join(nodes), action.format(selected)]
        port = f" -p {self.arguments.ssh_port}" if self.arguments.ssh_port else ""
        env = {**os.environ, "PDSH_SSH_ARGS_APPEND": os.environ.get("PDSH_SSH_ARGS_APPEND", "") + port}
        try:
            done = subprocess.run(
                shell, env=env, timeout=GRACE_SECONDS, start_new_session=True, check=False, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            waited = f"after {GRACE_SECONDS:g} s not ended on all of {', '.join(sorted(nodes))}"
            print(f"launchers/deepspeed.sh: {waited}", file=sys.stderr)
            return set()
        return nodes & set(done.stdout.split())


def main() -> int:
    arguments, command = parse(sys.argv[1:])
    try:
        slots = check(arguments, command)
    except ValueError as error:
        print(f"launchers/deepspeed.sh: {error}", file=sys.stderr)
        return REFUSED
    job = Job(arguments, list(slots))

    def stop(number: int, frame: FrameType | None) -> None:
        job.asked_to_stop = number

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    job.start(command)
    return job.wait()


if __name__ == "__main__":
    sys.exit(main())
