#!/usr/bin/env python3
"""What `merge.tune` takes on links of several speeds, and whether steps then wait as long as it has predicted.

    sudo benchmarks/tune.py                          two nodes, 20 to 200 Mbit/s: ten minutes, best on a quiet machine
    sudo benchmarks/tune.py --links 50 --rounds 1    a part of it

Every node is a network namespace of one rank. A run that is tuned takes turns with one that is not. Waiting is the
time in collectives between nodes that training stands still for, over the rest of the time, of whole windows after the
first; the arithmetic of merges is not in it, as no link makes it longer. Writes
benchmarks/results/tune.json and the table of docs/merge.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import hardware, told, write_between_marks
from merge_jobs import ROOT, emulated, script, shards

EVERY, WINDOWS = 20, 5
FIRST = EVERY * 3 // 2  # whatever was begun in the first window is through
MODEL = ["model={name: vit_tiny_patch16_224, image_size: 8, channels: 1}", "adapters.rank=16", "train.batch_size=16"]
MODEL += ["model.arguments={patch_size: 4, embed_dim: 384, depth: 4, num_heads: 4}", "merge.path=dense"]
Run = dict[str, Any]


def measure(link: float, tune: bool, data: Path) -> Run:
    """One run: what it chose and predicted, and how long it waited."""
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        overrides = [*MODEL, f"data={{train: {data / 'train'}, workers: 0}}", "metrics={port: 0, heads_every: 0}"]
        overrides += [f"metrics.every={EVERY}", f"merge.every={EVERY}", f"merge.tune={str(tune).lower()}"]
        overrides += ["checkpoint.every=0", f"train.duration={EVERY * (WINDOWS + 2)}", f"run_dir={run_dir}"]
        (Path(name) / "tune.yaml").write_text("{}\n")
        marks = [script("merge_lte.py"), str(FIRST), str(FIRST + EVERY * WINDOWS)]
        output = emulated(2, 1, link, [*marks, "train", str(Path(name) / "tune.yaml"), *overrides])
        log = (run_dir / "events.log").read_text()
    figures = told(output)
    if figures is None:
        sys.exit(f"no figures were told\n{output}")
    waited = figures["wait_seconds"]
    run: Run = {"link_mbit": link, "tune": tune, "waited": waited / (figures["seconds"] - waited)}
    run["steps_per_second"] = figures["steps"] / figures["seconds"]
    if tune:
        run |= predictions(log)
    return run


def predictions(log: str) -> Run:
    """What `merge.tune` has said."""
    gbit = re.search(r"merge.tune: steps of .*?, (\S+) Gbit/s between nodes", log)
    waits = re.search(r"merge.tune: steps \w+ wait (.*?) of their time, and (?:(\S+(?: x)?) with )?(.*)", log)
    assert gbit and waits, log
    now, then, options = waits.groups()
    predicted = {"predicted_now": share(now), "predicted": share(then or now)}
    return {"gbit": float(gbit.group(1)), **predicted, "options": options if then else ""}


def share(text: str) -> float:
    """`12.3%` or `1.2 x` as a number."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text.split()[0])


def table(runs: list[Run]) -> str:
    predicted = "predicted, measured"
    lines = [f"| link | measured | options taken | untuned: {predicted} | tuned: {predicted} | speed-up |"]
    lines += ["|---|---|---|---|---|---|"]
    for link in dict.fromkeys(run["link_mbit"] for run in runs):
        tuned, plain = ([r for r in runs if (r["link_mbit"], r["tune"]) == (link, t)] for t in (True, False))
        m = {key: statistics.median(r[key] for r in tuned) for key in ("gbit", "predicted_now", "predicted", "waited")}
        before = statistics.median(r["waited"] for r in plain)
        faster = statistics.median(
            t["steps_per_second"] / p["steps_per_second"] for t, p in zip(tuned, plain, strict=True)
        )
        options = ", ".join(dict.fromkeys(f"`{r['options'] or 'none'}`" for r in tuned))
        lines.append(
            f"| {link:g} Mbit/s | {1000 * m['gbit']:.0f} Mbit/s | {options} | {m['predicted_now']:.0%}, {before:.0%} "
            f"| {m['predicted']:.0%}, {m['waited']:.0%} | {faster:.2f} x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", type=float, default=[20.0, 50.0, 100.0, 200.0], help="Mbit/s")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("benchmarks/tune.py: network namespaces need root")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        data = shards("digits", Path(folder))
        for _, link, tune in itertools.product(range(arguments.rounds), arguments.links, (True, False)):
            runs.append(measure(link, tune, data))
            print(runs[-1], flush=True)
    date = datetime.date.today().isoformat()
    command = " ".join(["benchmarks/tune.py", *sys.argv[1:]])
    text = f"{table(runs)}\n\n`{command}`: medians of {arguments.rounds} rounds; {hardware()}; {date}."
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tune.json").write_text(json.dumps({"date": date, "hardware": hardware(), "runs": runs}) + "\n")
    if arguments.out == ROOT / "benchmarks" / "results":
        write_between_marks(ROOT / "docs" / "merge.md", "tune", text)


if __name__ == "__main__":
    main()
