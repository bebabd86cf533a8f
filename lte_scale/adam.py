"""AdamW by torch, by NVIDIA's apex or by DeepSpeed: the same numbers to fp32 rounding, and the same state.

The state of a parameter is `{"step": fp32 [], "exp_avg": like the parameter, "exp_avg_sq": like it}` whoever steps it,
and exists before the first step. So checkpoints are the same, and a run goes on with another optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lte_scale import apex
from lte_scale.engines import deepspeed
from lte_scale.log import log

# What `auto` prefers, of what can run and needs no compiling.
# CPU: benchmarks/optimizers.py, one thread of an AMD EPYC. A step over the factors and replica parameters of ViT-Ti,
# ViT-S (rank 32) and ViT-B (rank 64) takes DeepSpeedCPUAdam 1.46, 2.01 and 7.44 ms, torch fused 1.79, 2.43 and 6.92 ms.
# (ViT-B is bound by memory: with two threads 5.3 against 5.7 ms.)
# CUDA: no measurement of ours. All three are multi-tensor kernels that descend from apex's (pytorch#71274); torch's
# needs a further launch for its step counts and sorts the tensors by device and dtype at every step.
FASTEST = {"cpu": ("deepspeed", "adamw"), "cuda": ("apex", "deepspeed", "adamw")}


def choose(name: str, device: torch.device) -> str:
    """The optimizer that `optimizer.name` asks for: `auto` is the fastest that is there, and logged.

    Never one that would have to be compiled first: of DeepSpeed, `auto` takes what an earlier run has compiled.

    Raises:
        ValueError: if the one named cannot run here: what is missing, and how to get it.
    """
    if name == "auto":
        chosen = next(n for n in FASTEST[device.type] if not _lacking(n, device) and not _uncompiled(n, device))
        log.info("optimizer.name: auto is %s", chosen)
        return chosen
    if lack := _lacking(name, device):
        raise ValueError(f"optimizer.name: {lack}; or use optimizer.name=adamw")
    return name


def build_adam(
    name: str, groups: Sequence[dict[str, Any]], *, betas: tuple[float, float], eps: float, device: torch.device
) -> Optimizer:
    """AdamW over parameter groups with a `weight_decay` each; the learning rate, 0 so far, is to be set per group.

    Args:
        name: `adamw`, `apex` or `deepspeed` (what `choose` returns).
        groups: of contiguous fp32 parameters on `device`, those of a group with the same number of steps behind them:
            apex, and DeepSpeed on CUDA, count steps by group.

    Raises:
        ValueError: if it cannot be loaded or compiled.
    """
    groups = [group for group in groups if group["params"]]
    assert all(p.is_contiguous() for group in groups for p in group["params"])  # DeepSpeed would step a copy
    build = {"adamw": _torch_adamw, "apex": _apex_adam, "deepspeed": _deepspeed_adam}[name]
    optimizer = build(groups, betas=betas, eps=eps, device=device)
    steps = {} if name == "adamw" else IntegerSteps(optimizer).steps
    for parameter in (p for group in groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": steps[parameter] if steps else torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class IntegerSteps:
    """Keeps the state of this module for an optimizer that counts steps in integers, by parameter or by group.

    During a step the counts are integers, in every state and in every group. Otherwise they are the elements of one
    tensor on the CPU: reading it needs no synchronisation, and one operation counts a step of all P parameters.

    Attributes:
        steps: the count [] of every parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.steps_P = torch.zeros(len(parameters))
        self.steps: dict[Tensor, Tensor] = dict(zip(parameters, self.steps_P.unbind(), strict=True))
        optimizer.register_step_pre_hook(self._lend)
        optimizer.register_step_post_hook(self._take_back)

    def _lend(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        counts = iter(self.steps_P.int().tolist())
        for group in optimizer.param_groups:
            stepped = set()
            for parameter in group["params"]:
                optimizer.state[parameter]["step"] = count = next(counts)
                if parameter.grad is not None:
                    stepped.add(count)
            assert len(stepped) <= 1, f"parameters of one group have taken {sorted(stepped)} steps"
            group["step"] = max(stepped, default=0)

    def _take_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps_P += torch.tensor([parameter.grad is not None for parameter in self.steps])
        for parameter, step in self.steps.items():
            optimizer.state[parameter]["step"] = step


def _lacking(name: str, device: torch.device) -> str:
    """Why this optimizer cannot run; empty if it can."""
    if name == "apex" and (lack := apex.lacking("amp_C", device)):
        return f"NVIDIA's apex {lack}"
    return deepspeed.lacking() if name == "deepspeed" else ""


def _torch_adamw(groups: Any, *, betas: tuple[float, float], eps: float, device: torch.device) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=device.type in ("cpu", "cuda"))


def _apex_adam(groups: Any, *, betas: tuple[float, float], eps: float, device: torch.device) -> Optimizer:
    try:
        from apex.optimizers import FusedAdam

        adam: Optimizer = FusedAdam(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)
    except (ImportError, RuntimeError) as error:  # built for another torch or CUDA
        raise ValueError(
            f"optimizer.name: NVIDIA's apex does not load ({_first_line(error)}); build it anew for torch "
            f"{torch.__version__}, or use optimizer.name=adamw"
        ) from error
    return adam


def _deepspeed_adam(groups: Any, *, betas: tuple[float, float], eps: float, device: torch.device) -> Optimizer:
    if folder := _uncompiled("deepspeed", device):
        log.info("optimizer.name: compiling DeepSpeed's Adam in %s, once: it takes about a minute", folder)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    adam: Any
    try:
        if device.type == "cuda":
            adam = FusedAdam(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)
        else:
            adam = DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=eps, adamw_mode=True, fp32_optimizer_states=True)
    except Exception as error:  # of the compiler, of ninja, of a missing CUDA toolkit: each has its own type
        raise ValueError(
            f"optimizer.name: DeepSpeed's Adam does not compile here ({_first_line(error.__cause__ or error)}); it "
            "needs ninja, g++ and on CUDA nvcc; or use optimizer.name=adamw"
        ) from error
    if device.type == "cpu":
        adam.register_step_pre_hook(_take_powers_of_beta)
    return adam


def _take_powers_of_beta(adam: Any, args: Any, kwargs: Any) -> None:
    """Start DeepSpeedCPUAdam's C++ side anew, so that a resumed run goes on bit for bit.

    It multiplies beta^t up from step to step, while after loading it takes the power, some ulps apart.
    """
    adam.ds_opt_adam.create_adam(adam.opt_id, 0.0, *adam.param_groups[0]["betas"], 0.0, 0.0, adam.adam_w_mode, False)


def _uncompiled(name: str, device: torch.device) -> str:
    """The folder in which DeepSpeed would have to compile its operator first; empty if it is there."""
    if name != "deepspeed":
        return ""
    deepspeed.imported(device)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    operator = "fused_adam" if device.type == "cuda" else "cpu_adam"
    if installed_ops.get(operator) and accelerator_name == get_accelerator()._name:
        return ""
    folder = _get_build_directory(operator, False)
    return "" if (Path(folder) / f"{operator}.so").is_file() else folder


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
