"""Follow docker/Dockerfile.cpu in a clean Debian by chroot, and train in what comes of it: no container engine needed.

sudo .venv/bin/python docker/check_cpu_image.py [--build-arg NAME=VALUE ...]

Needs root, mmdebstrap and util-linux; minutes, some 8 GB in TMPDIR, and network as this machine has it. Everything runs
in mount and process namespaces of its own: when they end, so has every process and every mount, and the folder that
is then removed holds nothing of this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import host
import yaml
from dockerfile import Ignore, Instruction, assignments, base_image, expand, parse, sources

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "Dockerfile.cpu"
COMPOSE = ROOT / "docker" / "compose.yaml"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STEPS = 200
# Before a command of the image: a network of its own with nothing but loopback, so that ports are free.
ISOLATED = ["unshare", "--net", "sh", "-euc", 'ip link set lo up; exec "$@"', "sh"]


class Image:
    """A root that takes a Dockerfile's instructions one by one."""

    def __init__(self, root: Path, build_arguments: dict[str, str]) -> None:
        self.root, self.build_arguments = root, build_arguments
        self.ignore = Ignore((ROOT / ".dockerignore").read_text())
        self.environment = {"PATH": DEFAULT_PATH}
        self.arguments: dict[str, str] = {}
        self.outside = host.environment(root)
        self.folder, self.user = "/", "0:0"
        self.entrypoint: list[str] = []
        self.healthcheck: list[str] = []

    def take(self, instruction: Instruction) -> None:
        """Do what an instruction says."""
        began = time.monotonic()
        text = expand(instruction.text, self.arguments | self.environment)
        match instruction.name:
            case "ARG":
                name, given, default = text.partition("=")
                if name in self.build_arguments:
                    self.arguments[name] = self.build_arguments[name]
                elif given:
                    self.arguments[name] = dict(assignments(f"{name}={default}"))[name]
            case "ENV":
                self.environment |= assignments(text)
            case "WORKDIR":
                self.folder = os.path.join(self.folder, text)
                self.inside(self.folder).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(instruction)
            case "RUN":
                # Not `text`: the shell expands what is in it.
                run(self.command(instruction.command, self.arguments | self.outside), quiet=True)
            case "USER":
                self.user = text
            case "ENTRYPOINT":
                self.entrypoint = instruction.command
            case "HEALTHCHECK":
                self.healthcheck = instruction.command
            case "CMD" | "EXPOSE" | "LABEL":
                pass  # nothing that a root holds
            case _:
                raise ValueError(f"line {instruction.line}: {instruction.name} is not known here")
        say(
            f"{time.monotonic() - began:6.1f} s  line {instruction.line:2d}  {instruction.name} {instruction.text[:70]}"
        )

    def copy(self, instruction: Instruction) -> None:
        destination = self.inside(os.path.join(self.folder, instruction.text.split()[-1]))
        for source, name in sources(instruction, ROOT, self.ignore):
            target = destination / name if name else destination
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def command(self, words: Sequence[str], more: dict[str, str]) -> list[str]:
        """The words that run a command in the image: its user, folder and environment, and none of this machine's."""
        number = self.user.split(":")[0]
        entry = next(line for line in self.inside("/etc/passwd").read_text().splitlines() if f":x:{number}:" in line)
        variables = {"HOME": entry.split(":")[5], **more, **self.environment}
        in_folder = ["sh", "-euc", 'cd "$0" && exec "$@"', self.folder, *words]
        pairs = [f"{name}={value}" for name, value in variables.items()]
        group = "" if ":" in self.user else f":{number}"
        return ["chroot", f"--userspec={self.user}{group}", str(self.root), "env", "-i", *pairs, *in_folder]


def say(text: str) -> None:
    print(text, flush=True)


def run(words: Sequence[str], *, quiet: bool = False) -> None:
    """Run a command to its end; a quiet one shows what it said only where it fails."""
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT, check=False
    )
    if done.returncode:
        sys.exit(f"{(done.stdout or b'').decode()}exit code {done.returncode}")


def build(root: Path, build_arguments: dict[str, str]) -> Image:
    """A root with the image in it, mounted as a container's would be."""
    began = time.monotonic()
    instructions = parse(FILE.read_text())
    base = base_image(instructions)
    distribution, _, tag = base.partition(":")
    if distribution != "debian" or not tag.endswith("-slim"):
        sys.exit(f"{FILE.name}: {base}: only debian:SUITE-DATE-slim is known here")
    host.debian(tag.split("-")[0], root)
    host.mount(root)
    say(f"{time.monotonic() - began:6.1f} s  a clean root like {base}")
    image = Image(root, build_arguments)
    for instruction in instructions[[i.name for i in instructions].index("FROM") + 1 :]:
        image.take(instruction)
    return image


def check(image: Image) -> None:
    """The image's user and entry point, and the compose file's training with the image's health check."""
    for words in ("--version", "shards digits data/digits", "plan configs/demo.yaml", "id"):
        say(f"== {words}")
        run([*ISOLATED, *image.command([*image.entrypoint, *words.split()], {})])
    say(f"== the trainer of {COMPOSE.name}, {STEPS} steps; meanwhile: {' '.join(image.healthcheck)}")
    command = yaml.safe_load(COMPOSE.read_text())["services"]["trainer"]["command"]
    command = [re.sub(r"\$\{LTE_STEPS:-\d+\}", str(STEPS), word) for word in command]
    training = subprocess.Popen(
        [*ISOLATED, *image.command([*image.entrypoint, *command], {})], stdin=subprocess.DEVNULL
    )
    began = time.monotonic()
    unhealthy = {9464, 9465}
    while training.poll() is None and unhealthy:
        # Before the training has its own network, a run of this machine could answer.
        if os.readlink(f"/proc/{training.pid}/ns/net") != os.readlink("/proc/self/ns/net"):
            unhealthy -= {port for port in unhealthy if healthy(image, port, training.pid)}
        time.sleep(0.5)
    say(f"{'not ' if unhealthy else ''}healthy on both nodes after {time.monotonic() - began:.1f} s")
    code = training.wait()
    if code or unhealthy:
        sys.exit(f"the training ended with exit code {code}; never healthy on ports: {sorted(unhealthy) or 'none'}")
    run([*ISOLATED, *image.command([*image.entrypoint, "eval", "runs/demo"], {})])
    # Without a run there is nothing to be healthy.
    if healthy(image, 1, os.getpid()):
        sys.exit("the health check passes where no run is")


def healthy(image: Image, port: int, process: int) -> bool:
    """Whether the health check passes in the network of a process."""
    check = image.command(image.healthcheck, {"LTE_METRICS_PORT": str(port)})
    inside = ["nsenter", f"--net=/proc/{process}/ns/net", *check]
    return subprocess.run(inside, stdout=subprocess.DEVNULL, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        check(build(arguments.inside, dict(pair.split("=", 1) for pair in arguments.build_arg)))
        return
    lacking = [tool for tool in ("mmdebstrap", "unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if lacking or os.geteuid():
        sys.exit(f"needs root, and: {' '.join(lacking) or 'nothing else'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the root is removed then too
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="lte-image-"))
    try:
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        code = subprocess.run(
            [*alone, sys.executable, __file__, "--inside", str(root), *sys.argv[1:]], check=False
        ).returncode
    finally:
        if str(root) in Path("/proc/self/mounts").read_text():
            sys.exit(f"{root}: something is mounted in it; not removed")
        shutil.rmtree(root)
    say(f"== {'passed' if code == 0 else 'failed'} after {time.monotonic() - began:.0f} s")
    sys.exit(code)


if __name__ == "__main__":
    main()
