"""The baselines, each a translation to settings that the pieces understand.

    full      every linear layer dense, gradients averaged over all ranks at every step: data-parallel AdamW
    diloco    every linear layer dense in every head, merged every T steps by Nesterov momentum (arXiv 2311.08105)
    lora      one pair of factors for all ranks. Resetless, so that a merge, which lets evaluation see it, leaves
              W + s (B A - B' A') as it was: W_0 + s B A to the end (arXiv 2106.09685)
    relora    one pair for all ranks, merged into the base every T steps, then A drawn anew, B zero, the optimizer's
              state cleared and the learning rate warmed up again (arXiv 2307.05695)

LTE's multi-head LoRA, W + (s / N) sum_n B_n A_n with all heads on one batch, never merged (arXiv 2402.16828, section
3.1), needs no method of its own: it is `lora` with N times the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lte_scale.config.schema import Config, ConfigError

REWARM = 0.1
"""Share of a window in which ReLoRA's learning rate comes back."""


def translated(config: Config) -> Config:
    """What `config.method` sets; doing it twice changes nothing."""
    settings: dict[str, Callable[[Config], Config]] = {
        "full": lambda c: _one_head(_dense(c)),
        "diloco": lambda c: _with(_dense(c), "merge", outer="nesterov"),
        "lora": lambda c: _one_head(_with(c, "adapters", mode="resetless")),
        "relora": lambda c: _restarting(_one_head(c)),
    }
    return settings[config.method](config) if config.method in settings else config


def _with(config: Config, section: str, **values: object) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _dense(config: Config) -> Config:
    # There are no factors whose health could be measured.
    return _with(_with(config, "adapters", dense=["*"]), "metrics", heads_every=0)


def _one_head(config: Config) -> Config:
    return _with(config, "optimizer", average="all")


def _restarting(config: Config) -> Config:
    config = _with(config, "adapters", mode="reset", redraw=True)
    return _with(_with(config, "merge", optimizer_state="reset"), "schedule", rewarm=REWARM)


def check_method(config: Config) -> None:
    """What has no meaning for the method.

    Raises:
        ConfigError: one line naming the key, its value, and the remedy.
    """
    merge, adapters, base, method = config.merge, config.adapters, config.base, config.method
    refused: list[tuple[bool, str, str]] = []
    if adapters.dense == ["*"]:
        why = "with every layer dense there is no frozen base"
        refused += [
            (bool(adapters.rank_by_layer), f"adapters.rank_by_layer: {dict(adapters.rank_by_layer)}", why),
            (base.scope == "global", "base.scope: 'global'", why),
            (base.offload != "none", f"base.offload: {base.offload!r}", why),
            (base.quantised, f"base.precision: {base.precision!r}", why),
            (config.engine.name == "deepspeed", "engine.name: 'deepspeed'", why),
            (merge.fragments > 1, f"merge.fragments: {merge.fragments}", why),
            (merge.weight_decay > 0, f"merge.weight_decay: {merge.weight_decay:g}", why + "; optimizer.weight_decay"),
        ]
    if config.optimizer.average == "all":
        why = "with gradients averaged over all ranks there is one head, and nodes do not differ"
        refused += [
            (merge.outer != "average", f"merge.outer: {merge.outer!r}", why),
            (merge.delay > 0, f"merge.delay: {merge.delay}", why),
            (merge.cadence.two_level, f"merge.local_every: {merge.local_every}", why),
            (merge.precision != "fp32", f"merge.precision: {merge.precision!r}", why),
        ]
    for bad, key, why in refused:
        if bad:
            raise ConfigError(f"{key} has no meaning for method {method!r}: {why}; leave it out or use method=lte")
