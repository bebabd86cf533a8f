#!/usr/bin/env python3
"""The loader against decoding and augmenting alone: images a second of one core, for small images and for photographs.

    benchmarks/loader.py

The loader reads samples from shards in shuffled order, seeds every one by its number, takes note of damage and makes
batches; "alone" decodes, augments, normalises and mixes samples that lie in memory, by the same functions. They take
turns, a few batches each, in CPU time of one process and thread; the table has the median ratio of neighbours and its
range. Writes benchmarks/results/loader_cpu.json and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import hardware, write_between_marks
from PIL import Image

from lte_scale.assemble import train_stream
from lte_scale.config import load_config
from lte_scale.data import TrainStream, open_index
from lte_scale.reading import Sample, decode, head_batches
from lte_scale.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "loader_cpu.json"
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
PHOTO_SIZE = (500, 375)
PHOTOS = 600
CLASSES = 10
BATCH_SIZE = 32


@dataclass(frozen=True)
class Case:
    """Images and what a configuration does to them."""

    name: str
    config: str
    source: Callable[[Path], Path]


def photographs(folder: Path) -> Path:
    """An image folder of photographs as large as ImageNet's: parts of the two that scikit-learn has."""
    from sklearn.datasets import load_sample_images

    draw = random.Random(0)
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(PHOTOS):
        image = draw.choice(whole)
        left, top = (draw.randrange(have - want + 1) for have, want in zip(image.size, PHOTO_SIZE, strict=True))
        path = folder / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + PHOTO_SIZE[0], top + PHOTO_SIZE[1])).save(path, quality=90)
    return folder


CASES = (
    Case("28 x 28 PNG, flip and shift (vit_fashion)", "vit_fashion", lambda _: FASHION),
    Case("500 x 375 JPEG, RandAugment, mixup (vit_l_64gpu)", "vit_l_64gpu", photographs),
)


def alone(stream: TrainStream, samples: Sequence[Sample]) -> Iterator[int]:
    """Batches of samples in memory, decoded and augmented: the number of images of each."""
    endless = itertools.cycle(samples)
    while True:
        made = [
            decode(sample, stream.channels, stream.num_classes)
            for sample in itertools.islice(endless, stream.batch_size)
        ]
        pixels = stream.to_batch([stream.transform(image) for image, _ in made])
        if stream.erase:
            stream.erase(pixels)
        if stream.mixup:
            stream.mixup(pixels, torch.tensor([label for _, label in made]))
        yield len(pixels)


def rate(batches: Iterator[int], count: int) -> float:
    """Images per second of CPU time."""
    began = time.process_time()
    images = sum(itertools.islice(batches, count))
    return images / (time.process_time() - began)


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        source, shards = case.source(Path(name) / "images"), Path(name) / "shards"
        command = [sys.executable, "-m", "lte_scale", "shards", str(source), str(shards)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        data = shards / "train"
        overrides = [f"data.train={data}", "data.workers=0", f"train.batch_size={BATCH_SIZE}"]
        config = load_config(str(ROOT / "configs" / f"{case.config}.yaml"), overrides)
        index = open_index(str(data))
        stream = train_stream(config, index, index.num_classes, Topology())
        chosen = head_batches(
            index, "", seed=1, head=0, heads=1, buffer=1, size=min(index.samples, 2048), first=0, stride=1
        )
        loader = (len(batch.labels) for batch in stream.iterate())
        bare = alone(stream, next(chosen))
        rate(loader, 2)
        count = max(1, round(seconds * rate(bare, 2) / BATCH_SIZE))
        pairs = [(rate(loader, count), rate(bare, count)) for _ in range(rounds)]
    ratios = [ours / floor for ours, floor in pairs]
    return {
        "images": case.name,
        "loader": statistics.median(ours for ours, _ in pairs),
        "alone": statistics.median(floor for _, floor in pairs),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, arguments.rounds, arguments.seconds) for case in CASES]
    about = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "rows": rows}
    RESULT.write_text(json.dumps(about, indent=1) + "\n")
    lines = ["| images | loader, images/s | decoding and augmenting alone | ratio |", "|---|---|---|---|"]
    for row in rows:
        middle, low, high = row["ratio"]
        lines.append(
            f"| {row['images']} | {row['loader']:,.0f} | {row['alone']:,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    text = f"One of {about['hardware']}, {about['date']}:\n\n" + "\n".join(lines)
    print(text)
    write_between_marks(ROOT / "docs" / "performance.md", "loader", text)


if __name__ == "__main__":
    main()
