"""`lte-scale export` and `lte-scale eval`: the merged weights of a checkpoint as a plain timm model, in one process."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lte_scale import checksums
from lte_scale.collectives import Collectives
from lte_scale.config import Config, load_config
from lte_scale.contents import read_state
from lte_scale.evaluate import Evaluator
from lte_scale.model import attach, build
from lte_scale.precision import with_precision
from lte_scale.run_dir import best_checkpoint, resolve
from lte_scale.storage import read_metadata, read_tensors
from lte_scale.topology import Topology


def load_merged(checkpoint: Path, *, average: bool = False) -> tuple[Config, int, dict[str, Tensor]]:
    """The configuration, the number of classes and the timm state dict (fp32, CPU) of a checkpoint's merged weights.

    Args:
        average: take the moving average instead.

    Raises:
        ValueError: if the checkpoint is damaged, is not of the model in its config.yaml, or holds no moving average.
    """
    if damage := checksums.damage(checkpoint):
        raise ValueError(f"{checkpoint}: is damaged: {damage}; name another checkpoint")
    config = load_config(checkpoint / "config.yaml")
    metadata = read_metadata(checkpoint)
    stored = metadata.state_dict_metadata
    base, replica = ("average", "replica_average") if average else ("master", "replica_master")
    if not any(name.startswith(f"{replica}/") for name in stored):
        raise ValueError(f"{checkpoint}: holds no moving average; train with train.ema_decay above 0")
    classes = read_state(checkpoint).get("classes")
    if not isinstance(classes, int):
        raise ValueError(f"{checkpoint}: its train_state.json names no number of classes, as `lte-scale train` does")
    model = build(config.model, classes, seed=config.seed)
    buffers = {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    heads = attach(model, config.adapters, range(1), seed=config.seed)
    tensors = {f"{base}/{name}": torch.empty(shape.numel()) for name, shape in heads.weight_shapes.items()}
    tensors |= {f"{replica}/{name}": torch.empty(shape.numel()) for name, shape in heads.replica_shapes.items()}
    for name, tensor in tensors.items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            raise ValueError(f"{checkpoint}: {name} is not that of the model in its config.yaml, which was changed")
    read_tensors(tensors, checkpoint, metadata, alone=True)
    state |= {f"{name}.weight": tensors[f"{base}/{name}"].view(shape) for name, shape in heads.weight_shapes.items()}
    state |= {name: tensors[f"{replica}/{name}"].view(shape) for name, shape in heads.replica_shapes.items()}
    return config, classes, state


def timm_arguments(config: Config, classes: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` besides the name."""
    model = config.model
    return {"img_size": model.image_size, "in_chans": model.channels, "num_classes": classes, **model.arguments}


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale export`."""
    _add_source(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, .safetensors")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale eval`."""
    _add_source(parser)
    parser.add_argument("--data", help="validation shards (default: data.val of the run)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="run directory (its newest checkpoint) or checkpoint"
    )
    parser.add_argument("--best", action="store_true", help="the run's checkpoint with the best eval_top1")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")


def _checkpoint(arguments: argparse.Namespace) -> Path:
    checkpoint = resolve(arguments.source)
    return best_checkpoint(Path(arguments.source)) if arguments.best else checkpoint


def run_export(arguments: argparse.Namespace) -> int:
    """Write the merged weights; prints how to load them."""
    out: Path = arguments.out
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: timm knows safetensors by the extension; write {out}.safetensors")
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists; choose another file")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no directory {out.parent}; create it first")
    checkpoint = _checkpoint(arguments)
    config, classes, state = load_merged(checkpoint, average=arguments.ema)
    metadata = {"format": "pt", "model": config.model.name, "checkpoint": checkpoint.name}
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    words = "".join(f", {key}={value!r}" for key, value in timm_arguments(config, classes).items())
    print(f"{out}: {sum(t.numel() for t in state.values()):,} values of {checkpoint}; load with")
    print(f"timm.create_model({config.model.name!r}, checkpoint_path={str(out)!r}{words})")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """Print top-1 and top-5 of the merged weights in plain timm, in the precision of the run."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size: is {arguments.batch_size}; allowed: at least 1")
    checkpoint = _checkpoint(arguments)
    config, classes, state = load_merged(checkpoint, average=arguments.ema)
    location = arguments.data or config.data.val
    if not location:
        raise ValueError(f"{checkpoint}: its configuration names no data.val; give validation shards with --data")
    config = replace(
        config,
        data=replace(config.data, val=location),
        evaluate=replace(config.evaluate, batch_size=arguments.batch_size),
    )
    model = timm.create_model(config.model.name, **timm_arguments(config, classes))
    model.load_state_dict(state)
    device = _moved(model, arguments.device)
    alone = Collectives(Topology(nodes=1, ranks_per_node=1, heads_per_node=1))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=with_precision(config, device).train.bf16)
    evaluator = Evaluator(config, classes, alone, device, autocast)
    if evaluator.index is not None and evaluator.index.num_classes > classes:
        raise ValueError(f"{location}: has {evaluator.index.num_classes} classes, the model of {checkpoint} {classes}")
    figures = evaluator(model)
    print(
        f"{checkpoint}: top-1 {figures['eval_top1']:.2%}  top-5 {figures['eval_top5']:.2%}  "
        f"loss {figures['eval_loss']:.4f}"
    )
    return 0


def _moved(model: nn.Module, name: str) -> torch.device:
    try:
        device = torch.device(name)
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise ValueError(
            f"--device: {name} cannot be used ({str(error).splitlines()[0]}); allowed: cpu, cuda"
        ) from error
    return device
