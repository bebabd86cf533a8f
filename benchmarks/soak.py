#!/usr/bin/env python3
"""A run for an hour: do memory, open files or threads of any of its processes grow?

    benchmarks/soak.py --minutes 60
    benchmarks/soak.py --minutes 5 -- COMMAND ...        watch another command than the training

The training is small and does everything again and again: merges in two levels, evaluations, checkpoints, shards with
damaged images, metrics endpoints that are asked as often as the processes are looked at, every few seconds. The minutes
count from its second evaluation. The first tenth is left out; of the rest the first quarter is held against the last.

Exit code 1 if a process has grown: its resident memory by more than 2 % and 8 MB an hour, its descriptors or threads at
all; or if there are more processes. Writes benchmarks/results/soak.json and the table of docs/reliability.md, unless it
was another command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from figures import hardware, write_between_marks

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "soak.json"
DAMAGED_EVERY = 150
TRAINING = [
    *["model={name: vit_tiny_patch16_224, image_size: 8, channels: 1}", "adapters={rank: 4, alpha: 16}"],
    "model.arguments={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    *["train={duration: 100000000, batch_size: 16}", "merge={every: 20, local_every: 10}", "data.max_bad_ratio=0.1"],
    *["evaluate.every=100", "checkpoint={every: 50, keep_last: 2}", "metrics={every: 10, port: 19870}"],
]
SETTLED_STEPS = 210  # by then it has evaluated and saved for the second time: what starts threads has started them


@dataclass(frozen=True)
class Look:
    """What a process held, `seconds` after the start."""

    seconds: float
    memory_mb: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Row:
    """A process in the first and in the last quarter.

    Attributes:
        memory_mb: medians. `memory_mb_per_hour` is the slope over all.
        descriptors, threads: the least, which a leak raises; a save or an answer under way does not.
        grew: what grew beyond what it may, in words; empty if nothing did.
    """

    process: str
    memory_mb: tuple[float, float]
    memory_mb_per_hour: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    grew: str


def row(process: str, looks: Sequence[Look]) -> Row:
    """Judge a process by all looks at it."""
    quarter = max(1, len(looks) // 4)
    first, last = looks[:quarter], looks[-quarter:]

    hours = [look.seconds / 3600 for look in looks]
    slope = statistics.linear_regression(hours, [look.memory_mb for look in looks]).slope if len(looks) > 1 else 0.0
    memory = (statistics.median(x.memory_mb for x in first), statistics.median(x.memory_mb for x in last))
    descriptors = (min(x.descriptors for x in first), min(x.descriptors for x in last))
    threads = (min(x.threads for x in first), min(x.threads for x in last))
    apart = statistics.median(hours[-quarter:]) - statistics.median(hours[:quarter])
    grown = ["memory"] if memory[1] - memory[0] > 0.02 * memory[0] + 8 * apart else []
    grown += [name for name, (a, b) in {"descriptors": descriptors, "threads": threads}.items() if b > a]
    return Row(process, memory, slope, descriptors, threads, ", ".join(grown))


def family(pid: int) -> Iterator[tuple[int, int]]:
    """A process and all that descend from it, each with its parent."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for each in sorted(parents):
        above = each
        while above not in (0, pid):
            above = parents.get(above, 0)
        if above:
            yield each, parents[each]


def look(pid: int, seconds: float) -> Look:
    """
    Raises:
        OSError: if the process has ended.
        KeyError: if it has ended, and nobody has taken note.
    """
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    descriptors = len(os.listdir(folder / "fd"))
    return Look(seconds, int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]))


def name(pid: int, parent: int, names: dict[int, str]) -> str:
    """What to call a process: a rank, something of a rank, or by its command."""
    folder = Path("/proc") / str(pid)
    environ = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text(errors="replace").split("\0"))
    above = names.get(parent, "")
    if above.startswith("rank") or "RANK" in environ:
        called = f"child of {above}" if above.startswith("rank") else f"rank {environ['RANK']}"
    else:
        words = (folder / "cmdline").read_text().split("\0")
        script = next((Path(word).name for word in words if word.endswith(".py")), Path(words[0]).name)
        called = f"{script} agent" if "--agent" in words else script
    number = sum(other.partition(" #")[0] == called for other in names.values())
    return f"{called} #{number + 1}" if number else called


class Watch:
    """Looks at a job's processes, and asks its endpoints, every `every` seconds until `seconds` are over."""

    def __init__(self, job: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.job, self.run_dir = job, run_dir
        self.names: dict[int, str] = {}
        self.looks: dict[int, list[Look]] = {}
        self.counts: list[tuple[float, int]] = []
        self.answers = 0
        self.figures: dict[str, int] = {}

    def run(self, seconds: float, every: float) -> bool:
        """Returns whether the job was still there in the end."""
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds and self.job.poll() is None:
            self._look(now, settled=now > seconds / 10)
            self._ask()
            time.sleep(every)
        return self.job.poll() is None

    def await_step(self, step: int) -> None:
        """Until an endpoint tells of it, or the job has ended."""
        while self.figures.get("steps", 0) < step and self.job.poll() is None:
            self._ask()
            time.sleep(0.5)

    def _look(self, now: float, *, settled: bool) -> None:
        found = list(family(self.job.pid))
        for pid, parent in found:
            with suppress(OSError, KeyError):
                if pid not in self.names:
                    self.names[pid] = name(pid, parent, self.names)
                seen = look(pid, now)
                if settled:
                    self.looks.setdefault(pid, []).append(seen)
        if settled:
            self.counts.append((now, len(found)))

    def _ask(self) -> None:
        if not (self.run_dir / "endpoints").is_dir():
            return
        from lte_scale.top.scrape import Fetcher, find

        fetch = Fetcher(timeout=5)
        try:
            scrapes = [answer for target in find([str(self.run_dir)]) if not isinstance(answer := fetch(target), str)]
        except ValueError:  # none has begun to answer
            return
        finally:
            fetch.close()
        self.answers += len(scrapes)
        metrics = {
            "steps": "lte_step",
            "damaged images": "lte_bad_samples_total",
            "checkpoints": "lte_checkpoints_total",
        }
        for what, metric in metrics.items():
            per_node = [scrape.total(metric) for scrape in scrapes]
            total = sum(per_node) if what == "damaged images" else max(per_node, default=0)
            self.figures[what] = max(int(total), self.figures.get(what, 0))

    def rows(self) -> list[Row]:
        """Of the processes that were there in the first and in the last quarter."""
        if not self.counts:
            return []
        begin, end = self.counts[0][0], self.counts[-1][0]
        early, late = begin + (end - begin) / 4, end - (end - begin) / 4
        lasting = {
            pid: seen for pid, seen in self.looks.items() if seen[0].seconds <= early and seen[-1].seconds >= late
        }
        return [row(self.names[pid], seen) for pid, seen in lasting.items()]

    def more_processes(self) -> str:
        """What to say if there are more processes at the end than at first."""
        quarter = max(1, len(self.counts) // 4)
        before, after = (min(n for _, n in part) for part in (self.counts[:quarter], self.counts[-quarter:]))
        return f"processes: {before}, then {after}" if after > before else ""


def table(rows: Sequence[Row]) -> str:
    lines = ["| process | memory, MB | MB an hour | descriptors | threads | grew |", "|---|---|---|---|---|---|"]
    for each in rows:
        pairs = [" → ".join(f"{value:{form}}" for value in pair)
                 for pair, form in ((each.memory_mb, ".1f"), (each.descriptors, "g"), (each.threads, "g"))]  # fmt: skip
        cells = [each.process, pairs[0], f"{each.memory_mb_per_hour:+.1f}", *pairs[1:], each.grew or "nothing"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def damage(shards: Path) -> None:
    """Overwrite the beginning of every so many images."""
    count = 0
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            places = [member.offset_data for member in tar if member.name.endswith(".png")]
        with shard.open("r+b") as file:
            for place in places:
                count += 1
                if count % DAMAGED_EVERY == 0:
                    file.seek(place)
                    file.write(bytes(8))


def training(folder: Path) -> list[str]:
    """The command of the training, its data written and damaged in `folder`."""
    data = folder / "digits"
    subprocess.run([sys.executable, "-m", "lte_scale", "shards", "digits", str(data)], check=True, stdout=-3)
    damage(data / "train")
    place = ["--nodes", "2", "--ranks-per-node", "1", "--", "train", str(ROOT / "configs" / "demo.yaml"), *TRAINING]
    paths = [f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"run_dir={folder / 'run'}", "data.workers=1"]
    return [sys.executable, str(ROOT / "launchers" / "emulate.py"), *place, *paths]


def publish(rows: Sequence[Row], watch: Watch, minutes: float) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "hardware": hardware(),
        "minutes": minutes,
        "looks": len(watch.counts),
        "answers of endpoints": watch.answers,
        **watch.figures,
        "processes": [asdict(each) for each in rows],
    }
    RESULT.write_text(json.dumps(about, indent=1) + "\n")
    facts = ", ".join(f"{value:,} {what}" for what, value in watch.figures.items())
    told = f"`benchmarks/soak.py --minutes {minutes:g}`: {facts}, {watch.answers:,} answers of endpoints"
    text = f"{table(rows)}\n\n{told}; {about['hardware']}, {about['date']}."
    write_between_marks(ROOT / "docs" / "reliability.md", "soak", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="instead of the training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = arguments.command or training(Path(folder))
        with (Path(folder) / "output").open("w+b") as output:
            job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            watch = Watch(job, Path(folder) / "run")
            try:
                if not arguments.command:
                    watch.await_step(SETTLED_STEPS)
                lasted = watch.run(60 * arguments.minutes, arguments.every)
            finally:
                if job.poll() is None:
                    job.send_signal(signal.SIGTERM)
                job.wait()
            if not lasted:
                output.seek(0)
                said = output.read().decode(errors="replace")[-2000:]
                sys.exit(f"soak: ended by itself, with code {job.returncode}:\n{said}")
    rows = watch.rows()
    print(table(rows))
    more = watch.more_processes()
    grown = [f"{each.process}: {each.grew}" for each in rows if each.grew] + ([more] if more else [])
    print(f"grew: {'; '.join(grown) or 'nothing'}")
    if not arguments.command:
        publish(rows, watch, arguments.minutes)
    return 1 if grown or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
