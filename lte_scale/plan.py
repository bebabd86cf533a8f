"""`lte-scale plan`: memory per rank, bytes per step, merge and image, paths and FLOPs, against full-rank training."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from lte_scale.collectives import SCOPES
from lte_scale.config import check_topology, load_config, overridden
from lte_scale.estimate import Plan, Traces, make_plan, path_rows
from lte_scale.fit import MARGIN, fit, fit_lines
from lte_scale.link import Forecast, forecast
from lte_scale.quantities import rate, seconds, share, size
from lte_scale.suggest import suggest, suggestion_lines
from lte_scale.traffic import Traffic, by_scope


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale plan`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example merge.every=50")
    parser.add_argument("--nodes", type=int, default=1, metavar="K", help="nodes of the run (default 1)")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="G", help="ranks in a node (default 1)")
    parser.add_argument(
        "--link-gbit", type=float, metavar="X", help="Gbit/s of a node's network link: predict the time on it"
    )
    parser.add_argument(
        "--step-seconds", type=float, metavar="S", help="measured time of a step, to predict rates and waiting"
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="with both: merge options with which steps hardly wait for the link, to be added to the command line",
    )
    parser.add_argument(
        "--fit", type=float, metavar="GB", help="memory of one accelerator, 10^9 bytes: the batch and GPUs that fit"
    )
    parser.add_argument(
        "--margin", type=float, metavar="SHARE", help=f"share of it that --fit leaves alone (default {MARGIN})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`lte-scale plan`. Returns the exit code.

    Raises:
        ValueError: for what a user can mend.
    """
    config = load_config(args.config, args.overrides)
    for option, value in (("--nodes", args.nodes), ("--ranks-per-node", args.ranks_per_node)):
        if value < 1:
            raise ValueError(f"{option}: {value} is too small; give a number from 1 on")
    _check_link(args.link_gbit, args.step_seconds, args.suggest)
    _check_fit(args.fit, args.margin)
    check_topology(config, args.nodes, args.ranks_per_node)
    place = {"nodes": args.nodes, "ranks_per_node": args.ranks_per_node}
    traces = Traces(config)
    plan = make_plan(config, **place, traces=traces)
    found = suggestion = fitting = None
    memory: dict[str, int] = {}
    if args.link_gbit is not None:
        found = forecast(plan.arrangement, plan.full_rank, gbit=args.link_gbit, step_seconds=args.step_seconds)
    if args.suggest:
        suggestion = suggest(config, traces, **place, gbit=args.link_gbit, step_seconds=args.step_seconds)
        other = traces.arrangement(overridden(config, suggestion.overrides), **place)
        memory = {"memory_now": plan.memory.total, "memory": traces.memory(other).total}
    if args.fit is not None:
        margin = MARGIN if args.margin is None else args.margin
        fitting = fit(config, traces, **place, gigabytes=args.fit, margin=margin)
    if args.json:
        parts = {"link": found, "suggestion": suggestion, "fit": fitting}
        more = {key: asdict(part) for key, part in parts.items() if part}
        if suggestion:
            more["suggestion"] |= memory
        print(json.dumps(as_object(plan) | more, indent=2))
        return 0
    for line in lines(plan, found):
        print(line)
    if suggestion:
        print("\n".join(suggestion_lines(suggestion, **memory)))
    if fitting:
        print("\n".join(fit_lines(fitting)))
    return 0


def _check_link(gbit: float | None, step_seconds: float | None, wanted: bool) -> None:
    if wanted and step_seconds is None:
        raise ValueError("--suggest: needs --link-gbit and --step-seconds, to know how long steps would wait")
    for option, value in (("--link-gbit", gbit), ("--step-seconds", step_seconds)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{option}: {value:g} is no such number; give one above 0")
    if step_seconds is not None and gbit is None:
        raise ValueError(f"--step-seconds: {step_seconds:g} without --link-gbit; give the bandwidth of a node's link")


def _check_fit(gigabytes: float | None, margin: float | None) -> None:
    if gigabytes is not None and not 0 < gigabytes < math.inf:
        raise ValueError(f"--fit: {gigabytes:g} is no such memory; give the GB of one accelerator, for example 80")
    if margin is not None and not 0 <= margin < 1:
        raise ValueError(f"--margin: {margin:g} is no such share; give one from 0 on and below 1, for example {MARGIN}")
    if margin is not None and gigabytes is None:
        raise ValueError(f"--margin: {margin:g} without --fit; give the memory of one accelerator in GB")


def as_object(plan: Plan) -> dict[str, Any]:
    """The plan for `--json`: bytes as integers, traffic per node as scope -> purpose -> bytes."""
    a = plan.arrangement
    shapes, topology = a.shapes, a.topology
    traffic = {
        "step": plan.step,
        "gather": plan.gather,
        "local_merge": plan.local_merge,
        "region_merge": plan.region_merge,
        "global_merge": plan.global_merge,
        "window": plan.window,
    }
    return {
        "model": a.config.model.name,
        "parameters": shapes.values,
        "trainable_per_head": shapes.trainable_values,
        "nodes": topology.nodes,
        "ranks_per_node": topology.ranks_per_node,
        "heads_per_node": topology.heads_per_node,
        "images_per_node_step": plan.images_per_node_step,
        "flops_per_image": {"lte": plan.flops, "full_rank": plan.full_rank_flops},
        "memory_per_rank": {**asdict(plan.memory), "total": plan.memory.total},
        "activations": dict(plan.activations),
        "bytes_sent_per_node": {name: _nested(sent) for name, sent in traffic.items()},
        "bytes_sent_per_image": {scope: plan.per_image(scope) for scope in SCOPES},
        "paths": [asdict(row) for row in path_rows(a)],
        "comparison": [
            {
                "method": method.name,
                "memory": {**method.memory, "total": method.memory_total},
                "bytes_sent_per_node_step": dict(method.sent_per_step),
            }
            for method in plan.methods
        ],
    }


def _nested(traffic: Traffic) -> dict[str, dict[str, int]]:
    return {scope: {p: sent for (of, p), sent in sorted(traffic.items()) if of == scope} for scope in SCOPES}


def lines(plan: Plan, found: Forecast | None = None) -> Iterator[str]:
    """The plan as text."""
    yield from _heading(plan)
    yield from _memory_lines(plan)
    yield from _traffic_lines(plan)
    yield from _path_lines(plan)
    yield from _comparison_lines(plan)
    if found:
        yield from _link_lines(found)


def _heading(plan: Plan) -> Iterator[str]:
    a = plan.arrangement
    c, t, shapes = a.config, a.topology, a.shapes
    parameters, factors, replicas = (
        size(values, "") for values in (shapes.values, shapes.factor_values, shapes.replica_values)
    )
    yield (
        f"{c.model.name} at {c.model.image_size} px: {parameters} parameters; a head trains {factors} (factors) "
        f"and {replicas} (replica parameters)"
    )
    images = plan.images_per_node_step
    yield (
        f"{t.nodes} nodes x {t.ranks_per_node} ranks, {t.heads_per_node} heads per node; {images * t.nodes:,} images "
        f"per step, {images:,} per node"
    )
    local = f" ({a.cadence.levels})" if a.two_level else ""
    local += f", growing up to step {a.cadence.grown}" if a.cadence.growth else ""
    local += f" in {a.cadence.fragments} fragments" if a.cadence.fragments > 1 else ""
    local += f", {a.cadence.delay} steps under way" if a.cadence.delay else ""
    sent = "" if c.merge.precision == "fp32" else f", {c.merge.precision} between nodes"
    precision = c.train.precision + (f", base in {c.base.precision}" if c.base.quantised else "")
    yield f"base: scope {c.base.scope}, gather {c.base.gather}, engine {c.engine.name}, {precision}"
    yield f"merge: every {c.merge.every} steps{local}{sent}; {c.adapters.mode}, outer {c.merge.outer}"
    yield (
        f"FLOPs per image and training step: LTE {size(plan.flops, '')}, full-rank {size(plan.full_rank_flops, '')} "
        f"({plan.flops / plan.full_rank_flops:.2f})"
    )


def _memory_lines(plan: Plan) -> Iterator[str]:
    yield from ("", "Memory per rank")
    for field in fields(plan.memory):
        held = getattr(plan.memory, field.name)
        if held:
            yield f"  {field.name.replace('_', ' '):<34}{size(held):>12}"
    yield f"  {'total (without cpu)' if plan.memory.cpu else 'total':<34}{size(plan.memory.total):>12}"
    kept, checkpointed = (size(plan.activations[name]) for name in ("kept", "checkpointed"))
    yield f"  (activations: {kept}, or {checkpointed} with train.checkpoint_activations)"


def _traffic_lines(plan: Plan) -> Iterator[str]:
    a = plan.arrangement
    yield from ("", f"{'Bytes sent per node':<36}{'inter-node':>12}{'intra-node':>12}")
    rows = [("step", plan.step)]
    if a.config.base.gather == "window":
        rows.append(("first step after a merge, besides", plan.gather))
    if a.two_level:
        rows.append(("local merge", plan.local_merge))
    if a.cadence.region_every:
        rows.append(("region merge", plan.region_merge))
    rows += [("global merge", plan.global_merge), (f"window of {a.config.merge.every} steps", plan.window)]
    for title, traffic in rows:
        sent = by_scope(traffic)
        yield f"  {title:<34}{size(sent['inter_node']):>12}{size(sent['intra_node']):>12}"
        purposes = {purpose for _, purpose in traffic} if title != rows[-1][0] else set()
        for purpose in sorted(purposes):
            inter, intra = (traffic[scope, purpose] for scope in SCOPES)
            yield f"    {purpose:<32}{size(inter):>12}{size(intra):>12}"
    yield f"  {'per image':<34}{size(plan.per_image('inter_node')):>12}{size(plan.per_image('intra_node')):>12}"


def _path_lines(plan: Plan) -> Iterator[str]:
    rows = path_rows(plan.arrangement)
    width = max(len("layers"), *(len(row.layers) for row in rows)) + 2
    yield ""
    yield "Path of each layer in a global merge, and the bytes that leave a node on either"
    titles = f"{'rank':>6}{'count':>7}  {'path':<7}{'factor':>11}{'dense':>11}{'dense from':>14}"
    yield f"  {'layers':<{width}}{'weight':>12}{titles}"
    for row in rows:
        yield (
            f"  {row.layers:<{width}}{f'{row.out}x{row.into}':>12}{row.rank:>6}{f'x{row.count}':>7}  {row.path:<7}"
            f"{size(row.factor_bytes):>11}{size(row.dense_bytes):>11}{f'{row.dense_from:,} nodes':>14}"
        )


def _comparison_lines(plan: Plan) -> Iterator[str]:
    lte = plan.methods[0]
    titles = f"{'memory':>12}{'of LTE':>8}{'inter-node':>14}{'of LTE':>8}{'per image':>12}{'intra-node':>14}"
    yield from ("", "Against full-rank training of the same model: memory per rank, bytes sent per node and step")
    yield f"  {'':<18}{titles}"
    for method in plan.methods:
        inter, intra = (method.sent_per_step[scope] for scope in SCOPES)
        yield (
            f"  {method.name:<18}{size(method.memory_total):>12}{_ratio(method.memory_total, lte.memory_total):>8}"
            f"{size(inter):>14}{_ratio(inter, lte.sent_per_step['inter_node']):>8}"
            f"{size(inter / plan.images_per_node_step):>12}{size(intra):>14}"
        )


def _link_lines(found: Forecast) -> Iterator[str]:
    yield ""
    yield (
        f"On links of {found.link_gbit:g} Gbit/s, {found.payload_share:.0%} of it payload; delay {found.delay}, "
        f"fragments {found.fragments}; full-rank training with bf16 gradients"
    )
    titles = f"{'a step':>11}{'a window':>11}{'on the link':>13}{'average rate':>15}{'peak rate':>15}"
    yield f"  {'':<18}{titles}{'waits a window':>16}{'of step time':>14}"
    for row in found.methods:
        yield (
            f"  {row.name:<18}{size(row.step_bytes):>11}{size(row.window_bytes):>11}{seconds(row.link_seconds):>13}"
            f"{rate(row.average_gbit):>15}{rate(row.peak_gbit):>15}{seconds(row.stall_seconds):>16}"
            f"{share(row.stall_share):>14}"
        )
    yield "  (on the link: an exchange, or a step where there is none; a step's bytes hidden as far as one step can)"
    if found.step_seconds is None or found.hiding_delay is None:
        yield "  (rates and waiting need --step-seconds)"
        return
    yield (
        f"  steps of {seconds(found.step_seconds)}: a delay of {found.hiding_delay} hides LTE's exchange; this "
        f"configuration has room for {found.longest_delay}"
    )


def _ratio(value: float, of: float) -> str:
    return f"{value / of:.2f}" if of else "-"
