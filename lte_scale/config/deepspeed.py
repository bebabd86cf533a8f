"""The DeepSpeed JSON: generated from the configuration, with a user's own file merged over it, key by key checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lte_scale.config.schema import Config, ConfigError
from lte_scale.topology import Topology

PREFETCHED = 50_000_000
"""Values gathered ahead of the layer at work."""

_NEVER = 2**62
"""More elements than a weight has."""

_DETERMINED = {
    "train_batch_size": "train.batch_size, train.accumulate and the number of ranks",
    "train_micro_batch_size_per_gpu": "train.batch_size and topology.heads_per_node",
    "gradient_accumulation_steps": "train.accumulate",
    "bf16.enabled": "train.precision",
    "zero_optimization.stage": "the method: of frozen weights there is no gradient or optimizer state to shard",
    "zero_optimization.offload_param.device": "base.offload",
    "zero_optimization.memory_efficient_linear": "the method: true would replace the linear layers of the heads too",
}
"""Keys that are generated and that a file may repeat but not change, and what sets them."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    off: tuple[Any, ...]
    reason: str


_OWN_GRADIENTS = "a head's gradients are averaged over the ranks of that head and no others, outside DeepSpeed"
_OWN_STEP = "the heads are stepped outside DeepSpeed"
_STALE = "a quantised weight misses what merges add to it"
_REFUSED = {
    "optimizer": _Refusal((), f"{_OWN_STEP}; use optimizer.*"),
    "scheduler": _Refusal((), f"{_OWN_STEP}; use schedule.*"),
    "gradient_clipping": _Refusal((0,), "each head is clipped on its own; use optimizer.clip_norm"),
    "prescale_gradients": _Refusal((), _OWN_GRADIENTS),
    "gradient_predivide_factor": _Refusal((1,), _OWN_GRADIENTS),
    "sparse_gradients": _Refusal((), _OWN_GRADIENTS),
    "fp16": _Refusal((), "use train.precision"),
    "amp": _Refusal((), "use train.precision"),
    "activation_checkpointing": _Refusal((), "use train.checkpoint_activations"),
    "compression_training": _Refusal((), "the weights belong to the merge"),
    "quantize_training": _Refusal((), "the weights belong to the merge"),
    "elasticity": _Refusal((), "the number of ranks decides where the heads are; use topology.heads_per_node"),
    "data_efficiency": _Refusal((), "the stream decides what is read; use data.* and augment.*"),
    "curriculum_learning": _Refusal((), "the stream decides what is read; use data.* and augment.*"),
    "tensor_parallel": _Refusal((), "a layer's weight is one matrix to its heads"),
    "zero_optimization.offload_optimizer": _Refusal((), f"{_OWN_STEP}; use optimizer.*"),
    "zero_optimization.zero_hpz_partition_size": _Refusal((1,), "use base.scope=global with base.gather=node"),
    "zero_optimization.mics_shard_size": _Refusal((-1,), "use base.scope=node"),
    "zero_optimization.mics_hierarchical_params_gather": _Refusal((), "use base.scope=node"),
    "zero_optimization.zero_quantized_weights": _Refusal((), _STALE),
    "zero_optimization.zero_quantized_nontrainable_weights": _Refusal((), _STALE),
    "zero_optimization.zero_quantized_gradients": _Refusal((), _OWN_GRADIENTS),
    "zero_optimization.zenflow": _Refusal((), f"{_OWN_STEP}; use optimizer.*"),
}
"""Keys that would break the method unless they are off."""


def generated(config: Config, topology: Topology) -> dict[str, Any]:
    """The DeepSpeed configuration that `config` means on this topology."""
    images = topology.heads_per_rank * config.train.batch_size // topology.ranks_per_head
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        # A layer's weight is freed when the layer is done, as `base.gather: pass` says.
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": PREFETCHED,
        "stage3_param_persistence_threshold": _NEVER if config.base.gather == "window" else 0,
        "memory_efficient_linear": False,
    }
    if config.base.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": images * config.train.accumulate * topology.world_size,
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": config.train.accumulate,
        "steps_per_print": _NEVER,
        "bf16": {"enabled": config.train.bf16},
        "zero_optimization": zero,
    }


def settings(config: Config, topology: Topology) -> dict[str, Any]:
    """What DeepSpeed is given: `generated`, with the file `engine.deepspeed_config` merged over it.

    Raises:
        ConfigError: one line naming the file, the key, its value, and why or with what it contradicts.
    """
    ours = generated(config, topology)
    if not config.engine.deepspeed_config:
        return ours
    path = Path(config.engine.deepspeed_config)
    theirs = _read(path)
    _check(theirs, ours, config, path)
    return _merged(ours, theirs)


def _read(path: Path) -> dict[str, Any]:
    where = f"engine.deepspeed_config: {path}"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON ({error.msg}, line {error.lineno} column {error.colno})") from error
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{where}: cannot be read ({reason}){hint}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: is {type(tree).__name__}, not an object of DeepSpeed's keys")
    return tree


def _check(theirs: Mapping[str, Any], ours: Mapping[str, Any], config: Config, path: Path) -> None:
    where = f"engine.deepspeed_config: {path}"
    known = sorted({key.partition(".")[0] for key in (*ours, *_REFUSED)})
    for key in theirs:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            raise ConfigError(f"{where}: unknown key {key}; did you mean {near[0]}?")
    for key, value in _paths(theirs):
        refusal = _REFUSED.get(key)
        if refusal and not _is_off(value, refusal.off):
            raise ConfigError(f"{where}: {key} is {json.dumps(value)}: {refusal.reason}; leave it out")
        determined = _DETERMINED.get(key)
        if key == "zero_optimization.stage3_param_persistence_threshold" and config.base.gather == "window":
            determined = "base.gather=window"
        wanted = dict(_paths(ours)).get(key, "none")
        if determined and value not in (wanted, "auto"):
            raise ConfigError(
                f"{where}: {key} is {json.dumps(value)}, but {json.dumps(wanted)} follows from {determined}; "
                "leave it out"
            )


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False or value.get("device") == "none"
    return value in (None, False, "auto", *off)


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a tree with its value, sections too, as `a.b`."""
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict):
            tree[key] = _merged(tree.get(key) or {}, value)
        elif value != "auto":
            tree[key] = value
    return tree
