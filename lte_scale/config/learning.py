"""Sections on what is learned, from what and how: model, heads, optimizer, images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lte_scale.config.options import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The vision transformer, built by timm."""

    name: str = option("vit_tiny_patch16_224", "Name of a timm model.")
    num_classes: int = option(0, "Number of classes; 0 takes it from the index of the training shards.", least=0)
    image_size: int = option(224, "Height and width of the input, in pixels.", least=1)
    channels: int = option(3, "Colour channels of the input: 1 (grey) or 3 (RGB).", one_of=(1, 3))
    drop_path: float = option(0.0, "Stochastic depth rate.", least=0, most=0.9)
    arguments: Mapping[str, Any] = option({}, "Further arguments of timm.create_model (patch_size, embed_dim, ...).")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptersConfig:
    """The low-rank heads (arXiv 2402.16828, section 3)."""

    rank: int = option(32, "Rank r of the factors of every layer.", least=1)
    alpha: float = option(
        0.0,
        "Numerator of the scale s = alpha / r of the low-rank product. 0: scale and rates follow from optimizer.lr, "
        "which then is the rate of a dense AdamW (docs/recipes.md).",
        least=0,
    )
    mode: str = option(
        "reset",
        "reset: B is set to zero after a merge; resetless: factors are kept and only their change is merged.",
        one_of=("reset", "resetless"),
    )
    rank_by_layer: Mapping[str, int] = option(
        {}, "Rank by layer name pattern (shell style, first match wins), for example `blocks.*.attn.qkv: 64`."
    )
    redraw: bool = option(False, "Draw A anew after every global merge (mode reset, a merge of all layers at once).")
    dense: list[str] = option(
        [], "Layer name patterns (shell style) trained as dense replica parameters, without factors."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW over the factors and replica parameters of every head."""

    name: str = option(
        "adamw",
        "adamw: torch's, fused; apex: NVIDIA's FusedAdam; deepspeed: FusedAdam, on a CPU DeepSpeedCPUAdam; auto: the "
        "fastest that is there, so a resumed run may take another one where packages have changed.",
        one_of=("auto", "adamw", "apex", "deepspeed"),
    )
    lr: float = option(
        1e-3,
        "Peak learning rate of dense linear layers, and of the factors: by way of their scale if adapters.alpha is 0, "
        "else as it is.",
        above=0,
    )
    replica_lr: float = option(1e-3, "Peak learning rate of biases, norms, tokens and position embeddings.", above=0)
    beta1: float = option(0.9, "Decay of the first moment.", least=0, most=0.99999)
    beta2: float = option(0.999, "Decay of the second moment.", least=0, most=0.99999)
    eps: float = option(1e-8, "Added to the denominator.", above=0)
    weight_decay: float = option(0.0, "Decoupled weight decay of the factors (replica parameters have none).", least=0)
    clip_norm: float = option(1.0, "Gradient norm to which each head is clipped; 0 is off.", least=0)
    moments: str = option(
        "fp32",
        "What AdamW's moments are held in between steps: fp32, bf16, or log8, which is 8 bits, and a power of two for "
        "64 values. A step brings them to fp32, when no activations are held (docs/performance.md).",
        one_of=("fp32", "bf16", "log8"),
    )
    average: str = option(
        "head",
        "Whose gradients are averaged at every step: of the ranks that share a head, or of all ranks, which makes them "
        "all one head.",
        one_of=("head", "all"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over steps."""

    name: str = option("cosine", "Shape after the warm-up.", one_of=("cosine", "wsd", "constant"))
    warmup: str = option("0", "Linear warm-up: steps (`500`) or epochs (`2ep`).")
    decay: str = option("0", "Length of the final linear decay of `wsd`: steps or epochs.")
    final_ratio: float = option(0.01, "Last learning rate, as a ratio of the peak.", least=0, most=1)
    rewarm: float = option(
        0.0, "Share of the window after a global merge in which the rate comes back from zero.", least=0, most=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The inner loop."""

    duration: str = option("10ep", "Length of the run: steps (`500`) or epochs (`20ep`).")
    batch_size: int = option(128, "Images per head and micro-step; ranks that share a head share it.", least=1)
    accumulate: int = option(1, "Micro-steps per optimizer step.", least=1)
    precision: str = option(
        "auto",
        "bf16: autocast and bf16 compute copies over fp32 masters; fp32: everything in fp32; auto: bf16 where the "
        "device has instructions for it (`plan` takes it that it has), so a resumed run may take the other one on "
        "another machine.",
        one_of=("auto", "bf16", "fp32"),
    )
    norm: str = option(
        "torch",
        "LayerNorm by torch or by NVIDIA's apex (whose output is bf16 under precision bf16, where torch's is fp32); "
        "auto: apex on CUDA where it is there and compile is off.",
        one_of=("auto", "torch", "apex"),
    )
    compile: bool = option(False, "torch.compile every transformer block.")
    checkpoint_activations: bool = option(False, "Recompute each block's activations in the backward pass.")
    ema_decay: float = option(
        0.0, "Decay per merge of the moving average of the master; 0 is off.", least=0, most=0.99999
    )
    max_skipped: int = option(
        10,
        "A head starts again from the base after so many steps in a row skipped for a non-finite loss or gradient.",
        least=1,
    )
    diverged: float = option(
        2.0,
        "A head is left out of a merge, and starts again from the base, where its loss is more than so many times that "
        "at the merge before; 0 is off. The run stops when one does little else for three windows.",
        least=0,
    )
    device: str = option("auto", "auto takes CUDA where it is available.", one_of=("auto", "cpu", "cuda"))

    @property
    def bf16(self) -> bool:
        """Whether products are in bf16, as far as it is known before there is a device."""
        return self.precision != "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """WebDataset shards."""

    train: str = option("", "Training shards: a directory, a file pattern with {000..099}, or a URL of that form.")
    val: str = option("", "Validation shards, as `train`; empty means no evaluation.")
    shuffle_buffer: int = option(2048, "Samples in the shuffle buffer; 1 keeps the order of the shards.", least=1)
    workers: int = option(2, "Decoding processes per rank; 0 decodes in the training process.", least=0)
    prefetch: int = option(2, "Batches each worker holds ready.", least=1)
    cache_dir: str = option("", "Where shards named by URL are kept after their first download; empty streams them.")
    max_bad_ratio: float = option(
        0.01, "Stop when more than this ratio of the samples read is damaged.", least=0, most=1
    )
    allow_pipe: bool = option(False, "Accept `pipe:` URLs, which run a shell command.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """timm's augmentations of the training images."""

    crop_scale: float = option(1.0, "Smallest area of a random resized crop; 1 is a plain resize.", above=0, most=1)
    pad_crop: int = option(0, "Random crop after padding by so many pixels (small images).", least=0)
    hflip: float = option(0.0, "Probability of a horizontal flip.", least=0, most=1)
    rand_augment: str = option("", "timm RandAugment policy, for example `rand-m9-mstd0.5-inc1`; empty is off.")
    random_erasing: float = option(0.0, "Probability of erasing a random rectangle.", least=0, most=1)
    mixup: float = option(0.0, "Mixup alpha; 0 is off.", least=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 is off.", least=0)
    label_smoothing: float = option(0.0, "Label smoothing.", least=0, most=0.9)
    mean: list[float] = option([], "Mean per channel; empty takes ImageNet's for RGB and 0.5 for grey.")
    std: list[float] = option([], "Standard deviation per channel; empty as for `mean`.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation on merged weights."""

    every: str = option("1ep", "Steps or epochs; done at the first global merge that is due. 0 means at the end alone.")
    batch_size: int = option(256, "Images per rank and forward pass.", least=1)
