#!/usr/bin/env python3
"""How LTE and full-rank training grow with the number of GPUs: writes the tables of docs/scaling.md anew.

    benchmarks/scaling.py            from the models' figures in benchmarks/results/scaling_models.json
    benchmarks/scaling.py --trace    count those anew first: some minutes

All is computed, by the formulas of `lte-scale plan` (docs/plan.md); nothing runs on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lte_scale.arrangement import Arrangement
from lte_scale.baselines import FullRank, baselines
from lte_scale.config import load_config
from lte_scale.config.schema import Config
from lte_scale.cost import Layer, Shapes
from lte_scale.estimate import make_plan, path_rows
from lte_scale.link import Demand, Link, full_rank_demands, hiding_delay, lte_demand, predict
from lte_scale.memory import memory
from lte_scale.quantities import seconds, share, size
from lte_scale.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
FIGURES = ROOT / "benchmarks" / "results" / "scaling_models.json"
CONFIG = "configs/vit_l_64gpu.yaml"

RANKS_PER_NODE = 8
GPUS = (8, 16, 64, 256, 1024, 4096)
LINKS_GBIT = (1, 10, 100, 400)
MFU = 0.4
PEAK_FLOPS = 989e12  # an H100's dense bf16 peak, by its data sheet
PRECISIONS = ("fp32", "int8")

_COMMON = ("merge.local_every=0", "base.gather=pass")
MODELS: Mapping[str, tuple[str, ...]] = {
    "ViT-L/16": _COMMON,
    "ViT-H/14": (*_COMMON, "model.name=vit_huge_patch14_224"),
    "ViT-22B/14": (
        *_COMMON,
        "model.name=vit_giant_patch14_224",
        "model.arguments={embed_dim: 6144, depth: 48, num_heads: 48, mlp_ratio: 4}",
        "train.batch_size=16",
        "train.checkpoint_activations=true",
    ),
}
NAMES = {
    **{f"LTE {precision}": f"LTE {precision}" for precision in PRECISIONS},
    **{f"full-rank {name}": name for name in ("DiLoCo", "DDP", "FSDP")},
}


@dataclass(frozen=True, eq=False)
class Model:
    """A model and how it is trained: what does not depend on the number of nodes.

    Attributes:
        flops: of an image and training step, of LTE and of full-rank training.
        activations: bytes of one rank.
    """

    name: str
    config: Config
    shapes: Shapes
    flops: tuple[int, int]
    activations: int
    full_rank: FullRank

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Time of a step at the assumed MFU, of LTE and of full-rank training."""
        lte, full_rank = (flops * self.config.train.batch_size / (MFU * PEAK_FLOPS) for flops in self.flops)
        return lte, full_rank

    def arrangement(self, gpus: int, precision: str = "fp32", heads: int = RANKS_PER_NODE) -> Arrangement:
        topology = Topology(nodes=gpus // RANKS_PER_NODE, ranks_per_node=RANKS_PER_NODE, heads_per_node=heads)
        merge = replace(self.config.merge, precision=precision)
        return Arrangement(self.shapes, topology, replace(self.config, merge=merge))

    @cache  # noqa: B019
    def demands(self, gpus: int) -> dict[str, Demand]:
        """What each way to train asks of a node's link."""
        found = {demand.name: demand for demand in full_rank_demands(self.full_rank, self.arrangement(gpus))}
        for precision in PRECISIONS:
            found[f"LTE {precision}"] = lte_demand(self.arrangement(gpus, precision))
        return found


def trace(name: str) -> dict[str, Any]:
    """Count FLOPs, activations and shapes of a model, as plan does."""
    plan = make_plan(load_config(ROOT / CONFIG, list(MODELS[name])), nodes=2, ranks_per_node=RANKS_PER_NODE)
    shapes = plan.arrangement.shapes
    return {
        "layers": {key: [layer.out, layer.into, layer.rank, layer.unit] for key, layer in shapes.layers.items()},
        "replica_values": shapes.replica_values,
        "flops": [plan.flops, plan.full_rank_flops],
        "activations": plan.memory.activations,
        "full_rank": asdict(plan.full_rank),
    }


def models() -> list[Model]:
    """The models, with the figures that were counted last."""
    found = []
    for name, figures in json.loads(FIGURES.read_text()).items():
        layers = {key: Layer(*values) for key, values in figures["layers"].items()}
        full_rank = {**figures["full_rank"], "blocks": tuple(figures["full_rank"]["blocks"])}
        found.append(
            Model(
                name=name,
                config=load_config(ROOT / CONFIG, list(MODELS[name])),
                shapes=Shapes(layers, figures["replica_values"]),
                flops=(figures["flops"][0], figures["flops"][1]),
                activations=figures["activations"],
                full_rank=FullRank(**full_rank),
            )
        )
    return found


Rows = Iterator[Sequence[str]]


def model_rows(every: Sequence[Model]) -> Rows:
    """What is trained, and the step time that follows from the assumption."""
    yield (
        "model",
        "parameters",
        "a head trains",
        "images per GPU",
        "FLOPs per image, LTE / full-rank",
        "step, LTE / full-rank",
    )
    for model in every:
        yield (
            model.name,
            size(model.shapes.values, ""),
            size(model.shapes.trainable_values, ""),
            str(model.config.train.batch_size),
            " / ".join(size(flops, "") for flops in model.flops),
            " / ".join(map(seconds, model.step_seconds)),
        )


def memory_rows(model: Model) -> Rows:
    """Memory per rank."""
    yield "GPUs", "LTE fp32", "LTE int8", "DDP", "FSDP", "DiLoCo"
    for gpus in GPUS:
        lte = [memory(model.arrangement(gpus, p), activations=model.activations).total for p in PRECISIONS]
        full_rank = [method.memory_total for method in baselines(model.full_rank, model.arrangement(gpus).topology)]
        yield f"{gpus:,}", *(size(total) for total in (*lte, *full_rank))


def traffic_rows(model: Model) -> Rows:
    """Bytes that leave a node in a window, and per image."""
    yield "GPUs", *NAMES.values(), "on the dense path, fp32 / int8"
    images = model.config.merge.every * RANKS_PER_NODE * model.config.train.batch_size
    for gpus in GPUS:
        demands = [model.demands(gpus)[name].window_bytes for name in NAMES]
        yield (
            f"{gpus:,}",
            *(f"{size(sent)} ({size(sent / images)})" for sent in demands),
            " / ".join(f"{dense_share(model.arrangement(gpus, precision)):.0%}" for precision in PRECISIONS),
        )


def dense_share(a: Arrangement) -> float:
    """The share of the weights' values that takes the dense path between nodes."""
    if a.topology.nodes == 1:
        return 0.0
    dense = sum(layer.values for name, layer in a.shapes.layers.items() if a.paths[name] == "dense")
    return dense / sum(layer.values for layer in a.shapes.layers.values())


def time_rows(model: Model) -> Rows:
    """Seconds on the link, and the delay that hides them or what every step waits."""
    yield "GPUs", "method", *(f"{gbit} Gbit/s" for gbit in LINKS_GBIT)
    for gpus in (64, 4096):
        for name, title in NAMES.items():
            demand = model.demands(gpus)[name]
            step = model.step_seconds[0 if name.startswith("LTE") else 1]
            yield f"{gpus:,}", title, *(_time(demand, Link(gbit), step) for gbit in LINKS_GBIT)


def _time(demand: Demand, link: Link, step: float) -> str:
    found = predict(demand, link, step_seconds=step)
    if demand.exchange_bytes:
        return f"{seconds(found.link_seconds)} / {hiding_delay(demand, link, step_seconds=step):,}"
    return f"{seconds(found.link_seconds)} / {share(found.stall_share) if found.stall_share else 'none'}"


def crossing_rows(every: Sequence[Model]) -> Rows:
    """The number of nodes from which the dense path is cheaper."""
    yield "model", "layers", "weight", "8 heads, fp32", "8 heads, int8", "1 head, fp32", "1 head, int8"
    for model in every:
        columns = [path_rows(model.arrangement(16, p, heads)) for heads in (8, 1) for p in PRECISIONS]
        for kinds in zip(*columns, strict=True):
            first = kinds[0]
            if first.layers.startswith("blocks."):
                yield (
                    model.name,
                    first.layers,
                    f"{first.out} x {first.into}",
                    *(f"{kind.dense_from:,}" for kind in kinds),
                )


def tables(every: Sequence[Model]) -> dict[str, Rows]:
    """All tables of the page, by name."""
    found = {"models": model_rows(every), "crossing": crossing_rows(every)}
    for model in every:
        found[f"memory {model.name}"] = memory_rows(model)
        found[f"traffic {model.name}"] = traffic_rows(model)
        found[f"time {model.name}"] = time_rows(model)
    return found


def markdown(rows: Rows) -> str:
    """A table whose first row is the heading, figures to the right."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    columns = head.count("|") - 1
    return "\n".join([head, f"|---{'|---:' * (columns - 1)}|", *body])


def rewritten(page: str) -> str:
    """`page` with every table between `<!-- table NAME -->` and `<!-- end -->` as it is now.

    Raises:
        ValueError: naming a table that the page or the script lacks.
    """
    made = tables(models())
    named = re.findall(r"<!-- table (.*?) -->", page)
    if sorted(named) != sorted(made):
        raise ValueError(f"{PAGE.name}: tables {sorted(set(named) ^ set(made))} are in the page or the script alone")

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{markdown(made[match[1]])}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="count the models' figures anew first")
    if parser.parse_args().trace:
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(trace(name))}" for name in MODELS)
        FIGURES.write_text(f"{{\n{rows}\n}}\n")
    PAGE.write_text(rewritten(PAGE.read_text()))


if __name__ == "__main__":
    main()
