"""A timm vision transformer with LTE heads: built with its dense weights on the meta device, adapted, initialised."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import timm
import torch
from timm.layers.norm import LayerNorm2d, RmsNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lte_scale.adapters import (
    BaseWeight,
    Layout,
    LTELinear,
    LTEPatchConv,
    PerSample,
    ReplicaLinear,
    ReplicaNorm,
    ReplicaPatchConv,
)
from lte_scale.config.schema import AdaptersConfig, ModelConfig
from lte_scale.initial import base_slice, orthogonal_factor

_CHANNEL_SCALES = ("gamma", "gamma_1", "gamma_2")


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of this process inside a model: what is trained, merged and saved.

    Attributes:
        ids: global ids of the heads, in the order of the leading dimension of every trainable tensor.
        linears: the adapted layers, by the layer's name in the timm model.
        replicas: the replica parameters, by the parameter's name in the timm model; each viewable as [H, -1].
        replica_shapes: the shape each of them has in the timm model.
        weight_shapes: the shape each adapted layer's weight has in the timm model.
        alike: all heads of the run are one, so that they draw the same A.
        order: names of everything trainable, in the order of the model.
    """

    ids: range
    layout: Layout
    mode: str
    linears: Mapping[str, LTELinear]
    replicas: Mapping[str, nn.Parameter]
    replica_shapes: Mapping[str, torch.Size]
    weight_shapes: Mapping[str, torch.Size]
    alike: bool
    order: tuple[str, ...]

    def factor_parameters(self) -> dict[str, nn.Parameter]:
        """`LAYER.A` and `LAYER.B` of every adapted layer."""
        return {f"{name}.{f}": getattr(layer, f) for name, layer in self.linears.items() for f in ("A", "B")}

    def dense_weights(self) -> dict[str, nn.Parameter]:
        """The weights among the replica parameters: those of dense linear layers."""
        return {
            name: p
            for name, p in self.replicas.items()
            if name.endswith(".weight") and len(self.replica_shapes[name]) > 1
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trainable."""
        return {**self.factor_parameters(), **self.replicas}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw A for every head and set B to zero."""
        for name, layer in self.linears.items():
            if layer.A.is_meta:  # asked for its shapes alone
                continue
            rank, into = layer.A.shape[1:]
            for index, head in enumerate(self.ids):
                drawn = orthogonal_factor(name, rank, into, 0 if self.alike else head, seed=seed)
                layer.A[index].copy_(drawn)
            layer.B.zero_()
            if layer.A_prev is not None and layer.B_prev is not None:
                layer.A_prev.copy_(layer.A)
                layer.B_prev.copy_(layer.B)

    @torch.no_grad()
    def start_again(self, index: int, seed: int) -> None:
        """The head at `index` adds nothing to the base: A is drawn anew and B zero; resetless, both as last merged."""
        for name, layer in self.linears.items():
            if layer.A_prev is not None and layer.B_prev is not None:
                layer.A[index].copy_(layer.A_prev[index])
                layer.B[index].copy_(layer.B_prev[index])
            else:
                rank, into = layer.A.shape[1:]
                layer.A[index].copy_(orthogonal_factor(name, rank, into, self.ids[index], seed=seed))
                layer.B[index].zero_()


def build(config: ModelConfig, num_classes: int, *, seed: int) -> nn.Module:
    """The timm model, its linear and convolution weights on the meta device, all else as timm draws it.

    Raises:
        ValueError: for a name timm does not know, or arguments that the model does not take.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(f"model.name: timm has no model {config.name!r}; nearest: {', '.join(near) or 'none'}")
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": config.image_size,
        "in_chans": config.channels,
        "drop_path_rate": config.drop_path,
        **config.arguments,
    }
    try:
        with torch.random.fork_rng(devices=[]), _dense_weights_on_meta():
            torch.manual_seed(seed)
            try:
                return timm.create_model(config.name, pretrained=False, **arguments)
            except TypeError as error:  # models of any image size take no img_size
                if "'img_size'" not in str(error):
                    raise
                del arguments["img_size"]
                return timm.create_model(config.name, pretrained=False, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"model: timm cannot build {config.name} with {given}: {error}") from error


@contextmanager
def _dense_weights_on_meta() -> Iterator[None]:
    """Only dense weights move: small parameters and buffers keep the values that timm computes for them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and name == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def attach(model: nn.Module, config: AdaptersConfig, ids: range, *, seed: int, alike: bool = False) -> Heads:
    """Replace, in place, every linear map of `model` by one with heads, and make the rest replica parameters.

    Args:
        ids: global ids of the heads of this process.
        seed: of the initial values; the same on every rank.
        alike: all heads of the run are one.

    Raises:
        ValueError: naming a layer that cannot be adapted, and what to do; or a pattern that matches no layer.
    """
    layout = Layout(heads=len(ids))
    linears: dict[str, LTELinear] = {}
    weight_shapes: dict[str, torch.Size] = {}
    for name, module in list(model.named_modules()):
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]  # else the layer's weight is used past its forward
        replacement = _replacement(name, module, config, layout, seed)
        if replacement is None:
            continue
        if isinstance(replacement, LTELinear):
            linears[name] = replacement
            weight_shapes[name] = cast(Tensor, module.weight).shape
        model.set_submodule(name, replacement)
    _check_patterns(
        config, [*linears, *(n for n, m in model.named_modules() if isinstance(m, ReplicaLinear | nn.Conv2d))]
    )
    if layout.heads > 1:
        _give_bare_parameters_heads(model, layout)
        model.register_forward_pre_hook(_SamplesPerHead(layout))
    replicas = {_timm_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    order = tuple(replicas)
    for name in linears:
        del replicas[f"{name}.A"], replicas[f"{name}.B"]
    shapes = {name: _timm_shape(p, layout.heads, model, name) for name, p in replicas.items()}
    heads = Heads(ids, layout, config.mode, linears, replicas, shapes, weight_shapes, alike, order)
    heads.initialise(seed)
    return heads


class _SamplesPerHead:
    """Forward pre-hook of the model: bare parameters repeat by the batch at hand."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layout.samples_per_head = inputs[0].shape[0] // self.layout.split


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _replacement(name: str, module: nn.Module, config: AdaptersConfig, layout: Layout, seed: int) -> nn.Module | None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        return _linear_replacement(name, module, config, layout, seed)
    if isinstance(module, nn.LayerNorm | RmsNorm | nn.RMSNorm) and not isinstance(module, LayerNorm2d):
        if module.weight is None:
            return None
        rms = not isinstance(module, nn.LayerNorm)
        eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
        return ReplicaNorm(layout, module.weight, getattr(module, "bias", None), eps=eps, rms=rms)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"model: layer {name} is a {type(module).__name__}, whose running statistics have no place in LTE; "
            "choose a model with LayerNorm"
        )
    return None


def _linear_replacement(
    name: str, module: nn.Linear | nn.Conv2d, config: AdaptersConfig, layout: Layout, seed: int
) -> nn.Module | None:
    if isinstance(module, nn.Conv2d):
        patches = module.stride == module.kernel_size and module.groups == 1 and module.dilation == (1, 1)
        if not (patches and module.padding in ((0, 0), 0)):
            return _dense_convolution(name, module, config, layout, seed)
    shape = (module.weight.shape[0], module.weight[0].numel())
    if _matches(name, config.dense):
        weight = _draw(name, shape, initial_std(module), seed)
        if isinstance(module, nn.Linear):
            return ReplicaLinear(layout, weight, module.bias)
        convolution = ReplicaPatchConv(layout, weight, module.bias)
        convolution.kernel = cast(tuple[int, int], module.kernel_size)
        return convolution
    asked = next((r for pattern, r in config.rank_by_layer.items() if fnmatchcase(name, pattern)), config.rank)
    kind = LTEPatchConv if isinstance(module, nn.Conv2d) else LTELinear
    layer = kind(
        layout,
        shape,
        rank=min(asked, *shape),  # a higher rank adds nothing; the scale stays that of the rank asked for
        scale=config.alpha / asked or math.nan,  # automatic: it depends on all heads of the run (`assemble`)
        mode="resetless" if config.mode == "resetless" else "reset",
        bias=module.bias,
    )
    layer.initial_std = initial_std(module)
    if isinstance(layer, LTEPatchConv):
        layer.kernel = cast(tuple[int, int], module.kernel_size)
    return layer


def _dense_convolution(
    name: str, module: nn.Conv2d, config: AdaptersConfig, layout: Layout, seed: int
) -> nn.Module | None:
    if _matches(name, config.dense) and layout.heads == 1:
        shape = (module.weight.shape[0], module.weight[0].numel())
        module.weight = nn.Parameter(_draw(name, shape, initial_std(module), seed).view(module.weight.shape))
        return None
    remedy = (
        f"train it densely with adapters.dense=[{name}]"
        if layout.heads == 1
        else "choose another model, or heads_per_node no larger than the ranks of a node with it in adapters.dense"
    )
    raise ValueError(
        f"model: layer {name} (Conv2d, kernel {module.kernel_size}, stride {module.stride}) is no linear map over "
        f"patches and takes no factors; {remedy}"
    )


def initial_std(module: nn.Module) -> float:
    """Standard deviation of the initial weight: 0.02 for linear layers as in timm's ViT, PyTorch's own for others."""
    if isinstance(module, nn.Conv2d):
        return 1 / math.sqrt(3 * module.weight[0].numel())
    return 0.02


def _draw(name: str, shape: tuple[int, int], std: float, seed: int) -> Tensor:
    return base_slice(name, shape, 0, shape[0] * shape[1], std=std, seed=seed).view(shape)


def _check_patterns(config: AdaptersConfig, names: Sequence[str]) -> None:
    for key, patterns in (("rank_by_layer", list(config.rank_by_layer)), ("dense", config.dense)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1)
                raise ValueError(f"adapters.{key}: {pattern!r} matches no layer; nearest: {', '.join(near) or 'none'}")


def _give_bare_parameters_heads(model: nn.Module, layout: Layout) -> None:
    known = (BaseWeight, LTELinear, ReplicaLinear, ReplicaNorm)
    for prefix, module in list(model.named_modules()):
        if isinstance(module, known) or prefix.split(".")[-1] == "parametrizations":
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            token = parameter.ndim > 1 and parameter.shape[0] == 1
            full = f"{prefix}.{name}" if prefix else name
            if not token and name not in _CHANNEL_SCALES:
                raise ValueError(
                    f"model: parameter {full} {tuple(parameter.shape)} cannot be kept once per head in one process; "
                    "set topology.heads_per_node to at most the ranks of a node"
                )
            parametrize.register_parametrization(module, name, PerSample(layout, token), unsafe=True)


def _timm_name(name: str) -> str:
    """`parametrizations.pos_embed.original` is `pos_embed` in timm's model."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def _timm_shape(parameter: nn.Parameter, heads: int, model: nn.Module, name: str) -> torch.Size:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, ReplicaPatchConv) and parameter.ndim == 3:
        return torch.Size((parameter.shape[1], parameter.shape[2] // math.prod(owner.kernel), *owner.kernel))
    if isinstance(owner, LTELinear | ReplicaLinear | ReplicaNorm):
        return parameter.shape[1:]
    if heads == 1:
        return parameter.shape
    token = cast(Any, owner).parametrizations[name.rpartition(".")[2]][0].token
    return torch.Size((1, *parameter.shape[1:])) if token else parameter.shape[1:]
