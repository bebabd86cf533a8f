"""The precision a run computes in, where the configuration leaves it to the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from lte_scale.config.schema import Config
from lte_scale.log import log


def with_precision(config: Config, device: torch.device) -> Config:
    """`train.precision: auto` replaced by what it is on `device`; a warning where bf16 is asked for and slow there."""
    fast = fast_bf16(device)
    if config.train.precision == "auto":
        return replace(config, train=replace(config.train, precision="bf16" if fast else "fp32"))
    if config.train.bf16 and not fast:
        log.warning(
            "train.precision: bf16 has no instructions on this %s and may take ten times as long as fp32 or more; "
            "use train.precision=auto",
            "CPU" if device.type == "cpu" else "GPU",
        )
    return config


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
