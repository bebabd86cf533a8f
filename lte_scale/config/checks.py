"""What must hold between keys: checked before any process group, file or accelerator is touched."""

from __future__ import annotations

import difflib
import math
from urllib.parse import urlsplit

from lte_scale.config.deepspeed import settings
from lte_scale.config.methods import check_method
from lte_scale.config.schema import Config, ConfigError, FaultToleranceConfig, MergeConfig
from lte_scale.schedules import parse_duration, parse_range
from lte_scale.topology import Topology

_OWN_KEYS = {
    "img_size": "model.image_size",
    "in_chans": "model.channels",
    "num_classes": "model.num_classes",
    "drop_path_rate": "model.drop_path",
    "pretrained": "none: LTE trains from scratch",
    "checkpoint_path": "none: LTE trains from scratch",
}
_LONGEST = 1e12  # steps or epochs: exact as a float, also times the steps of an epoch


def check(config: Config) -> None:
    """Cross-field checks.

    Raises:
        ConfigError: one line naming the keys, their values, and the remedy.
    """
    _durations(config)
    _merge_and_base(config)
    check_method(config)
    _fault_tolerance(config)
    _model_and_data(config)


def _durations(config: Config) -> None:
    texts = {
        "train.duration": config.train.duration,
        "schedule.warmup": config.schedule.warmup,
        "schedule.decay": config.schedule.decay,
        "evaluate.every": config.evaluate.every,
        "checkpoint.every": config.checkpoint.every,
    }
    for key, text in texts.items():
        try:
            value, _ = parse_duration(text)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        if value > _LONGEST:
            raise ConfigError(f"{key}: {text[:20]!r} is beyond {_LONGEST:g}; write steps as `500` or epochs as `2ep`")
        if key == "train.duration" and value == 0:
            raise ConfigError(f"{key}: {text!r} trains nothing; write steps as `500` or epochs as `2ep`")
    decaying = parse_duration(config.schedule.decay)[0] > 0
    if decaying and config.schedule.name != "wsd":
        raise ConfigError(
            f"schedule.decay: {config.schedule.decay!r} has no meaning for schedule.name {config.schedule.name!r}; "
            "use schedule.name=wsd or leave it out"
        )
    if not decaying and config.schedule.name == "wsd":
        raise ConfigError("schedule.decay: '0' with schedule.name 'wsd'; say how long the final decay is, e.g. 2ep")


def _merge_and_base(config: Config) -> None:
    merge, base = config.merge, config.base
    _regions(config)
    local = merge.cadence.local_every
    _divides_every(merge, "local_every", local)
    if base.scope == "global" and local != merge.every:
        raise ConfigError(
            f"merge.local_every: {local} with base.scope 'global': one base over all nodes cannot differ between "
            f"them; use merge.local_every={merge.every} or base.scope=node"
        )
    _delay_and_fragments(config)
    if 0 < merge.growth < 0.01:
        raise ConfigError(f"merge.growth: {merge.growth:g} is too small; use 0.01 or more, or 0 for none")
    if merge.growth and config.schedule.rewarm:
        raise ConfigError(
            f"schedule.rewarm: {config.schedule.rewarm:g} with merge.growth {merge.growth:g}: growing windows have no "
            "common share; use merge.growth=0 or schedule.rewarm=0"
        )
    if config.adapters.redraw and (config.adapters.mode, merge.delay, merge.fragments) != ("reset", 0, 1):
        raise ConfigError(
            f"adapters.redraw: true with adapters.mode {config.adapters.mode!r}, merge.delay {merge.delay} and "
            f"merge.fragments {merge.fragments}: A can be drawn anew where every B is zero at once; use mode reset, "
            "delay 0 and fragments 1, or leave it out"
        )
    if base.scope == "node" and base.gather == "node":
        raise ConfigError(
            "base.gather: 'node' is for base.scope 'global'; with 'node' it is what base.gather=pass does"
        )
    if merge.outer == "average" and (merge.outer_lr != 1.0 or merge.outer_momentum != 0.9):
        raise ConfigError(
            f"merge.outer_lr, merge.outer_momentum: {merge.outer_lr:g}, {merge.outer_momentum:g} have no meaning for "
            "merge.outer 'average'; use merge.outer=nesterov or leave them out"
        )
    if config.engine.name == "none" and (base.scope, base.gather) != ("node", "pass"):
        raise ConfigError(
            f"engine.name: 'none' shards nothing, so base.scope {base.scope!r} and base.gather {base.gather!r} have no "
            "meaning; leave them out or use engine=fsdp"
        )
    if config.engine.name == "deepspeed" and base.quantised:
        raise ConfigError(
            f"base.precision: {base.precision!r} with engine.name 'deepspeed', which gathers floating-point numbers "
            "alone; use engine=fsdp or base.precision=auto"
        )
    if config.engine.deepspeed_config and config.engine.name != "deepspeed":
        raise ConfigError(
            f"engine.deepspeed_config: {config.engine.deepspeed_config!r} has no meaning for engine.name "
            f"{config.engine.name!r}; leave it out or use engine.name=deepspeed"
        )


def _delay_and_fragments(config: Config) -> None:
    merge, cadence = config.merge, config.merge.cadence
    _divides_every(merge, "fragments", merge.fragments)
    apart, local = cadence.apart, cadence.local_every
    if cadence.two_level and apart % local:
        raise ConfigError(
            f"merge.fragments: {merge.fragments} merge {apart} steps apart, which merge.local_every {local} does not "
            f"divide; use merge.fragments={merge.every // local} or fewer, or merge.local_every={merge.every}"
        )
    if merge.delay > cadence.longest_delay:
        raise ConfigError(
            f"merge.delay: {merge.delay} steps, but the next merge begins after {cadence.longest_delay + 1}; use "
            f"merge.delay={cadence.longest_delay} or less"
        )
    if merge.delay and config.base.scope == "global":
        raise ConfigError(
            f"merge.delay: {merge.delay} with base.scope 'global': with one base over all nodes a node has no weights "
            "of its own to go on from; use base.scope=node or merge.delay=0"
        )
    if merge.optimizer_state != "keep" and (merge.delay or merge.fragments > 1):
        raise ConfigError(
            f"merge.optimizer_state: {merge.optimizer_state!r} is for all layers at once, and with merge.delay "
            f"{merge.delay} and merge.fragments {merge.fragments} they do not merge at once; use "
            "merge.optimizer_state=keep"
        )


def _regions(config: Config) -> None:
    merge, cadence, nodes = config.merge, config.merge.cadence, config.topology.nodes_per_region
    if not merge.region_every and not nodes:
        if merge.region_precision != "fp32":
            raise ConfigError(
                f"merge.region_precision: {merge.region_precision!r} has no meaning without regions; set "
                "merge.region_every and topology.nodes_per_region, or leave it out"
            )
        return
    if not merge.region_every or nodes < 2:
        raise ConfigError(
            f"merge.region_every, topology.nodes_per_region: {merge.region_every} and {nodes}; regions need both, of "
            "two nodes or more"
        )
    if merge.region_every >= merge.every or cadence.apart % merge.region_every:
        raise ConfigError(
            f"merge.region_every: {merge.region_every} must divide the {cadence.apart} steps between global merges "
            f"(merge.every {merge.every}, merge.fragments {merge.fragments}) and be less than merge.every"
        )
    if merge.region_every % cadence.local_every:
        raise ConfigError(
            f"merge.local_every: {cadence.local_every} must divide merge.region_every {merge.region_every}; use "
            f"merge.local_every={math.gcd(cadence.local_every, merge.region_every)} or leave it out"
        )


def _fault_tolerance(config: Config) -> None:
    ft, merge = config.fault_tolerance, config.merge
    if not ft.enabled:
        return
    lighthouse_address(ft)
    if ft.node >= ft.nodes:
        raise ConfigError(
            f"fault_tolerance.node: {ft.node} of {ft.nodes} nodes; they are numbered from 0 to fault_tolerance.nodes-1"
        )
    only: list[tuple[str, object, tuple[object, ...]]] = [
        ("base.scope", config.base.scope, ("node",)),
        ("optimizer.average", config.optimizer.average, ("head",)),
        ("merge.delay", merge.delay, (0,)),
        ("merge.fragments", merge.fragments, (1,)),
        ("merge.path", merge.path, ("auto", "dense")),
        ("merge.precision", merge.precision, ("fp32",)),
        ("merge.region_every", merge.region_every, (0,)),
        ("merge.tune", merge.tune, (False,)),
    ]
    for key, value, allowed in only:
        if value not in allowed:
            raise ConfigError(
                f"{key}: {value!r} with fault_tolerance.enabled: nodes that come and go exchange whole changes at "
                f"once, in fp32; use {key}={allowed[0]}"
            )


def lighthouse_address(config: FaultToleranceConfig) -> tuple[str, int]:
    """Host and port of `fault_tolerance.lighthouse`.

    Raises:
        ConfigError: if it is no such address.
    """
    try:
        address = urlsplit(config.lighthouse)
        host, port = address.hostname, address.port
    except ValueError:  # brackets that do not close, a port that is no number or too large a one
        host = port = None
    if not host or not port or address.scheme != "http":
        raise ConfigError(
            f"fault_tolerance.lighthouse: {config.lighthouse!r}; allowed: the address of a torchft_lighthouse, as "
            "http://head:29510"
        )
    return host, port


def _divides_every(merge: MergeConfig, key: str, value: int) -> None:
    if merge.every % value:
        near = max(n for n in range(1, min(value, merge.every) + 1) if merge.every % n == 0)
        raise ConfigError(f"merge.{key}: {value} does not divide merge.every {merge.every}; nearest: {near}")


def _model_and_data(config: Config) -> None:
    for name in config.model.arguments:
        if name in _OWN_KEYS:
            raise ConfigError(f"model.arguments.{name}: has a key of its own: {_OWN_KEYS[name]}")
    for key in ("mean", "std"):
        values = getattr(config.augment, key)
        if values and len(values) != config.model.channels:
            raise ConfigError(f"augment.{key}: {values} has {len(values)} values for {config.model.channels} channels")
    if any(value <= 0 for value in config.augment.std):
        raise ConfigError(f"augment.std: {config.augment.std}; allowed: numbers above 0")
    if (config.augment.mixup or config.augment.cutmix) and config.train.batch_size % 2:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is odd, and augment.mixup and augment.cutmix pair images; "
            f"use {config.train.batch_size + 1}"
        )
    for key in ("train", "val"):
        location = getattr(config.data, key)
        if location.startswith("pipe:") and not config.data.allow_pipe:
            raise ConfigError(f"data.{key}: {location!r} runs a shell command; allow it with data.allow_pipe=true")
    if not config.run_dir.strip():
        raise ConfigError("run_dir: is empty; name a directory, for example runs/first")
    if config.resume not in ("auto", "never") and "/" not in config.resume:
        near = difflib.get_close_matches(config.resume, ["auto", "never"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"resume: {config.resume!r}; allowed: auto, never, or a path such as runs/x{hint}")
    _metrics(config)


def _metrics(config: Config) -> None:
    try:
        parse_range(config.profile.steps)
    except ValueError as error:
        raise ConfigError(f"profile.steps: {error}") from error
    if 0 < config.watchdog.seconds < 1:
        raise ConfigError(f"watchdog.seconds: {config.watchdog.seconds:g} is shorter than a step; use 1 or more, or 0")
    metrics = config.metrics
    for key in ("key", "client_ca"):
        if getattr(metrics, key) and not metrics.certificate:
            raise ConfigError(f"metrics.{key}: {getattr(metrics, key)!r} has no meaning without metrics.certificate")
    if "/" in metrics.job:
        raise ConfigError(f"metrics.job: {metrics.job!r}; allowed: a name without slashes")
    if metrics.pushgateway and not metrics.port:
        raise ConfigError("metrics.pushgateway: pushes what the endpoint serves; set metrics.port as well")
    address = metrics.address
    if not address or any(c.isspace() or c == "/" for c in address) or address.count(":") == 1:
        raise ConfigError(f"metrics.address: {address!r}; allowed: an address or host name without port, as 127.0.0.1")


def check_training(config: Config) -> None:
    """What `train` needs besides, and `plan` does not.

    Raises:
        ConfigError: as `check`.
    """
    if not config.data.train:
        raise ConfigError(
            "data.train: is empty; name training shards, for example data/images/train as lte-scale shards writes them"
        )


def check_topology(config: Config, nodes: int, ranks_per_node: int) -> None:
    """Whether the heads and their batches fit on `nodes` x `ranks_per_node` ranks.

    Raises:
        ValueError: as `check`.
    """
    if config.fault_tolerance.enabled and nodes > 1:
        raise ConfigError(
            f"fault_tolerance.enabled: every node is a job of its own, this one has {nodes} nodes; start "
            "`torchrun --standalone` on each, with its fault_tolerance.node"
        )
    if config.engine.name == "none" and nodes * ranks_per_node > 1:
        raise ConfigError(
            f"engine.name: 'none' is for one process, this run has {nodes} x {ranks_per_node}; use engine=fsdp"
        )
    topology = Topology(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        heads_per_node=config.topology.heads_per_node or ranks_per_node,
        nodes_per_region=config.topology.nodes_per_region,
    )
    if config.optimizer.average == "all" and topology.heads_per_rank > 1:
        raise ConfigError(
            f"topology.heads_per_node: {topology.heads_per_node} on {ranks_per_node} ranks, but gradients that are "
            f"averaged over all (method {config.method!r}) make one head; use topology.heads_per_node=0 and "
            f"train.batch_size={config.train.batch_size * topology.heads_per_rank}"
        )
    share, rest = divmod(config.train.batch_size, topology.ranks_per_head)
    if rest:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} images per head cannot be shared by "
            f"{topology.ranks_per_head} ranks; use {(share + 1) * topology.ranks_per_head}"
        )
    if (config.augment.mixup or config.augment.cutmix) and share % 2:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} leaves {share} images per rank, and mixup and cutmix pair "
            f"images; use {2 * config.train.batch_size}"
        )
    if config.engine.name == "deepspeed":
        settings(config, topology)
