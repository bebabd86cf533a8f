#!/usr/bin/env python3
"""LTE against DDP, FSDP and DiLoCo on emulated nodes with slow links: bytes sent, images per second, time in merges.

    sudo benchmarks/merge.py                                           everything: hours
    sudo benchmarks/merge.py --nodes 2 --links 100 --rounds 1          a part of it
    benchmarks/merge.py --accuracy --epochs 5 --seeds 0 1              top-1 on Fashion-MNIST, resumable

Every node is a network namespace. Methods alternate in every round; the tables have medians and spreads. Writes
benchmarks/results/merge.json (merge_accuracy.json) and the table of docs/merge.md. `--continue` keeps the runs that an
interrupted call with the same settings has made.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import hardware, told, write_between_marks
from merge_jobs import ROOT, emulated, script, shards, write_config
from merge_table import Run, accuracy_table, link_name, speed_table

from lte_scale.config import ConfigError, load_config

# What the rows of LTE add to the configuration that all methods share. Of 16 steps (--every) a fragment has 4.
LTE = {
    "lte_plain": ["merge.precision=bf16"],
    "lte_full": ["merge.precision=int8", "merge.fragments=4", "merge.delay=3"],
    "lte_far": ["merge.precision=int4", "merge.fragments=4", "merge.delay=3"],
}
EVERY = {"lte_far": 48}  # in place of --every
GROWTH = {"lte_far": ["merge.growth=0.1"]}  # of the first windows: for --accuracy, as what is measured is past them
PEERS = ("ddp", "fsdp", "diloco")
METHODS = (*PEERS, *LTE)

MODEL = ["model.name=vit_small_patch16_224", "model.image_size=28", "model.channels=1"]
MODEL += ["model.arguments={patch_size: 7}", "data.workers=0", "evaluate.every=0"]
# For --accuracy: configs/vit_fashion.yaml with as many heads as ranks, others at the rates that docs/quality.md found.
GLOBAL_BATCH = 128
RATES = {"ddp": 2e-3, "fsdp": 2e-3, "diloco": 1e-3}
# Every step of these costs the same; those that merge have a window to warm up.
WARM_UP_STEPS = {"ddp": 2, "fsdp": 2}

RESULTS = ROOT / "benchmarks" / "results"
FASHION, DIGITS = Path("/usr/share/datasets/fashion-mnist"), "digits"


def refuse(arguments: argparse.Namespace) -> str:
    """Why this cannot run here and what to do, or nothing."""
    if "diloco" in arguments.methods and importlib.util.find_spec("torchft") is None:
        return "diloco needs the package torchft: pip install 'lte-scale[fault-tolerance]', or leave it out"
    if arguments.accuracy:
        # The digits are too few to tell methods apart.
        if arguments.data == DIGITS:
            return f"--accuracy needs {FASHION}: apt-get install dataset-fashion-mnist, or other images by --data"
        return ""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need the command {missing[0]}: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return ""


def measure(method: str, nodes: int, link: float | None, arguments: argparse.Namespace, data: Path) -> Run:
    """One run of one method: its figures between two steps, whole windows apart."""
    with tempfile.TemporaryDirectory() as name:
        config = write_config(Path(name), None, speed_overrides(method, arguments, data))
        first = first_mark(method, config)
        last = first + every(method, arguments) * arguments.windows
        if method in LTE:
            words = [script("merge_lte.py"), str(first), str(last), "train", str(config)]
        else:
            words = [script("peers.py"), method, str(config), "--marks", str(first), str(last)]
        output = emulated(nodes, arguments.ranks_per_node, math.inf if link is None else link, words)
    figures = told(output)
    if figures is None:
        sys.exit(f"{method}: told no figures\n{output}")
    images = nodes * arguments.ranks_per_node * arguments.batch_size
    return {"method": method, "nodes": nodes, "link_mbit": link, "images_per_step": images, **figures}


def speed_overrides(method: str, arguments: argparse.Namespace, data: Path) -> list[str]:
    """The configuration of a run that is measured: no evaluation, and nothing saved but at the end."""
    overrides = [*MODEL, f"data.train={data / 'train'}", f"train.batch_size={arguments.batch_size}"]
    period = every(method, arguments)
    overrides += [f"merge.every={period}", f"metrics.every={period}", "checkpoint.every=0", "metrics.heads_every=0"]
    # A window to warm up, and one after the last mark: a run ends with a checkpoint and with merges that nothing hides.
    overrides += [f"train.duration={period * (arguments.windows + 2)}"]
    return [*overrides, *arguments.set, *LTE.get(method, ())]


def first_mark(method: str, config: Path) -> int:
    """The step after which a method is warm, and no merge is under way."""
    merge = load_config(config).merge
    return WARM_UP_STEPS.get(method, merge.every + (merge.delay if method in LTE else 0))


def train(method: str, seed: int, arguments: argparse.Namespace, data: Path, folder: Path) -> Run:
    """One run of one method to its end: held-out accuracy."""
    nodes, ranks = arguments.nodes[0], arguments.ranks_per_node
    overrides = [f"data={{train: {data / 'train'}, val: {data / 'val'}, workers: 0}}", "topology.heads_per_node=0"]
    overrides += [f"train.batch_size={GLOBAL_BATCH // (nodes * ranks)}", f"seed={seed}"]
    overrides += [f"train.duration={duration(arguments)}", f"merge.every={every(method, arguments)}"]
    overrides += [*arguments.set, *GROWTH.get(method, ())]
    overrides += LTE.get(method) or [f"optimizer.lr={RATES[method]}"]
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, ROOT / "configs" / "vit_fashion.yaml", overrides)
    figures: dict[str, Any] | None
    if method in LTE:  # goes on from its last checkpoint
        emulated(nodes, ranks, None, ["train", str(config)])
        figures = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    else:
        figures = told(emulated(nodes, ranks, None, [script("peers.py"), method, str(config)]))
    if figures is None or "eval_top1" not in figures:
        sys.exit(f"{method}: told no accuracy")
    return {"method": method, "seed": seed, "eval_top1": figures["eval_top1"]}


def every(method: str, arguments: argparse.Namespace) -> int:
    """Steps between merges."""
    return EVERY.get(method, int(arguments.every))


def duration(arguments: argparse.Namespace) -> str:
    return f"{arguments.epochs:g}ep" if arguments.steps is None else str(arguments.steps)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for runs to be in one table."""
    shared = {"ranks_per_node": arguments.ranks_per_node, "set": arguments.set, "lte": LTE, "data": arguments.data}
    shared["merge_every"] = {method: every(method, arguments) for method in METHODS}
    if arguments.accuracy:
        return {**shared, "duration": duration(arguments), "nodes": arguments.nodes[0], "global_batch": GLOBAL_BATCH}
    return {**shared, "windows": arguments.windows, "batch_size_per_rank": arguments.batch_size, "model": MODEL}


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Command, place and time of a benchmark."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout
    names = [name for name in ("torch", "timm", "torchft") if importlib.util.find_spec(name)]
    return {
        "command": f"benchmarks/merge.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "settings": settings(arguments),
    }


def kept(path: Path, arguments: argparse.Namespace) -> list[Run]:
    """The runs in `path`, if they were made with these settings."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    runs: list[Run] = result["runs"]
    return runs if result["settings"] == settings(arguments) else []


def save(path: Path, runs: list[Run], arguments: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(arguments), "runs": runs}, indent=1) + "\n")


def speed(arguments: argparse.Namespace) -> None:
    """Rounds of all methods on all numbers of nodes and links; the table."""
    path = arguments.out / "merge.json"
    runs = kept(path, arguments) if arguments.go_on else []
    made = {(run["round"], run["nodes"], run["link_mbit"], run["method"]) for run in runs}
    plan = itertools.product(range(1, arguments.rounds + 1), arguments.nodes, arguments.links, arguments.methods)
    with tempfile.TemporaryDirectory() as folder:
        data = shards(arguments.data, Path(folder))
        for number, nodes, link, method in plan:
            if (number, nodes, link, method) in made:
                continue
            run = {"round": number, **measure(method, nodes, link, arguments, data)}
            runs.append(run)
            save(path, runs, arguments)
            print(f"round {number}: {nodes} nodes, {link_name(link)}: {run}", flush=True)
    publish(arguments, "merge", speed_table(runs), f"rounds: {arguments.rounds}; {Path(arguments.data).name}")


def accuracy(arguments: argparse.Namespace) -> None:
    """All methods and seeds to the same number of samples; the table. What is done is not done again."""
    path = arguments.out / "merge_accuracy.json"
    runs = kept(path, arguments)
    made = {(run["seed"], run["method"]) for run in runs}
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = arguments.work / "shards"
    if not data.exists():  # under its name once it is whole
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder_name:
            shards(arguments.data, Path(folder_name)).rename(data)
    for seed, method in itertools.product(arguments.seeds, arguments.methods):
        if (seed, method) in made:
            continue
        folder = arguments.work / f"{method}_{seed}_{duration(arguments)}"
        runs.append(train(method, seed, arguments, data, folder))
        save(path, runs, arguments)
        print(runs[-1], flush=True)
    length = f"{arguments.epochs:g} epochs" if arguments.steps is None else f"{arguments.steps} steps"
    samples = f"{length} of {Path(arguments.data).name}, {GLOBAL_BATCH} images per step"
    publish(arguments, "merge_accuracy", accuracy_table(runs), samples)


def publish(arguments: argparse.Namespace, name: str, table: str, what: str) -> None:
    """Print a table with what it was made by; put it on the page if the results are kept in their place."""
    facts = about(arguments)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    text = f"{table}\n\n`{facts['command']}`: {what}; {facts['hardware']}; {versions}; {facts['date']}."
    print(text)
    if arguments.out == RESULTS:
        write_between_marks(ROOT / "docs" / "merge.md", name, text)


def link(text: str) -> float | None:
    """Mbit/s, or None for `none`."""
    if text == "none":
        return None
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--links", nargs="+", type=link, default=[100.0, 1000.0, None], help="Mbit/s, or none")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=16, help="steps between merges, of DiLoCo too")
    parser.add_argument("--windows", type=int, default=1, help="of so many steps, that are measured")
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank and step")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration of all methods")
    data = str(FASHION) if FASHION.exists() else DIGITS
    parser.add_argument("--data", default=data, help=f"what `lte-scale shards` reads; here by default {data}")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the runs of an interrupted call")
    parser.add_argument("--accuracy", action="store_true", help="train to the end, on the first of --nodes")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "merge_accuracy", help="where --accuracy trains")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if reason := refuse(arguments):
        sys.exit(f"benchmarks/merge.py: {reason}")
    try:
        (accuracy if arguments.accuracy else speed)(arguments)
    except ConfigError as error:
        sys.exit(f"benchmarks/merge.py: {error}")


if __name__ == "__main__":
    main()
