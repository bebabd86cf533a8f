"""NVIDIA's apex: whether it is here, and its LayerNorm. Its Adam is in `adam`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_scale.log import log

LayerNorm = Callable[[Tensor, Sequence[int], Tensor | None, Tensor | None, float], Tensor]


def lacking(extension: str, device: torch.device) -> str:
    """Why the part of apex whose kernels are in the module `extension` cannot be used; empty if it can.

    Looks at files and imports nothing: the package called apex on the package index is a toolkit for the Pyramid web
    framework, and its import fails without that framework.
    """
    spec = importlib.util.find_spec("apex")
    where = list(spec.submodule_search_locations or []) if spec else []
    if not spec:
        lack = "is not installed"
    elif not any((Path(folder) / "optimizers").is_dir() for folder in where):
        lack = (
            f"is not the package at {', '.join(where) or spec.origin} (pip's apex is a toolkit for Pyramid: remove it)"
        )
    elif importlib.util.find_spec(extension) is None:
        lack = f"at {', '.join(where)} was built without {extension}"
    else:
        return "" if device.type == "cuda" else f"runs on CUDA alone, and this run is on {device.type}"
    return f"{lack}; the project's container image has it, or build github.com/NVIDIA/apex with --cpp_ext --cuda_ext"


def layer_norm(name: str, device: torch.device, *, compiled: bool) -> LayerNorm:
    """The function behind `train.norm`: torch's F.layer_norm or apex's, with the same arguments and results.

    `auto` takes apex's where it can run, but none in compiled blocks, whose norms the compiler fuses. Under autocast
    apex returns the lower precision, where torch returns fp32.

    Raises:
        ValueError: for `apex` where it is not NVIDIA's, not built, or has no CUDA device.
    """
    lack = lacking("fused_layer_norm_cuda", device)
    if name == "apex" and lack:
        raise ValueError(f"train.norm: NVIDIA's apex {lack}; or use train.norm=torch")
    chosen = "apex" if name == "apex" or (name == "auto" and not lack and not compiled) else "torch"
    if name == "auto":
        log.info("train.norm: auto is %s", chosen)
    return _fused_layer_norm() if chosen == "apex" else F.layer_norm


def _fused_layer_norm() -> LayerNorm:
    from apex.normalization.fused_layer_norm import fused_layer_norm, fused_layer_norm_affine

    def normalise(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if weight is not None and bias is not None:
            y: Tensor = fused_layer_norm_affine(x, weight, bias, shape, eps)
            return y
        y = fused_layer_norm(x, shape, eps)  # apex has no affine without a bias
        return y if weight is None else y * weight

    return normalise
