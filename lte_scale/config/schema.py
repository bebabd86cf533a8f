"""What can be configured: frozen dataclasses, one per section of the YAML file.

The text under a field is its documentation and `one_of`, `least` and `most` its range: the loader checks
them and the reference page is generated from them. Checks that span sections are in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_scale.cadence import Cadence

SENT = ("fp32", "bf16", "int8", "int4")
"""What values between nodes can be sent in."""


class ConfigError(ValueError):
    """One line that names the key, its value, what is allowed and what to do."""


def option(
    default: Any,
    doc: str,
    *,
    one_of: tuple[Any, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A documented dataclass field. `least` and `most` are inclusive bounds, `above` an exclusive lower one."""
    metadata = {"doc": doc, "one_of": one_of, "least": least, "above": above, "most": most}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


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
class TopologyConfig:
    """Where the heads are."""

    heads_per_node: int = option(
        0, "Heads in a node; 0 means one per rank. Divides the ranks of a node, or is a multiple of them.", least=0
    )
    nodes_per_region: int = option(
        0,
        "Neighbouring nodes that make a region (a rack, a data centre) and merge among themselves every "
        "`merge.region_every` steps; divides the nodes. 0: no regions.",
        least=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseConfig:
    """The frozen dense weights: how they are sharded and gathered."""

    scope: str = option(
        "node",
        "node: sharded inside a node, one copy per node; global: sharded over all ranks of all nodes.",
        one_of=("node", "global"),
    )
    gather: str = option(
        "pass",
        "pass: gathered in every forward and backward; node: as pass, from a copy sharded inside the node; "
        "window: gathered once per window by every rank.",
        one_of=("pass", "node", "window"),
    )
    offload: str = option(
        "none",
        "cpu: this rank's parts of the weights are kept in CPU memory and copied to the accelerator on use.",
        one_of=("none", "cpu"),
    )
    precision: str = option(
        "auto",
        "auto: products read weights held in their own precision; int8, nf4: in 8 or 4 bits with a scale for 64 "
        "values, decoded for each product, beside the fp32 parts that merges add to (docs/engines.md).",
        one_of=("auto", "int8", "nf4"),
    )

    @property
    def quantised(self) -> bool:
        """Whether weights are held in other values than those of the master."""
        return self.precision != "auto"

    @property
    def crosses_nodes(self) -> bool:
        """Whether weights are gathered from all nodes in every pass."""
        return self.scope == "global" and self.gather == "pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What shards the base. `engine: fsdp` is short for `engine: {name: fsdp}`."""

    name: str = option(
        "fsdp",
        "fsdp: PyTorch FSDP2; deepspeed: ZeRO-3; none: a single process, nothing sharded.",
        one_of=("fsdp", "deepspeed", "none"),
    )
    deepspeed_config: str = option(
        "", "JSON file merged over the DeepSpeed configuration that is generated from this one (engine deepspeed)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """When and how heads are merged into the base."""

    every: int = option(50, "Optimizer steps T between global merges.", least=1)
    local_every: int = option(
        0, "Steps between merges inside a node; divides `every` and `region_every`; 0 means the same.", least=0
    )
    region_every: int = option(
        0,
        "Steps between merges inside a region (`topology.nodes_per_region`): its nodes go on from the mean of their "
        "weights; divides `every` and the steps between two fragments. 0: no regions.",
        least=0,
    )
    region_precision: str = option(
        "fp32",
        "What crosses between the nodes of a region at its merges, as `precision`.",
        one_of=SENT,
    )
    growth: float = option(
        0.0,
        "How windows grow: none is longer than this share of the steps before it, until they have `every` steps. The "
        "early ones merge all layers at once, and everybody waits for it. 0: all have `every`; else at least 0.01.",
        least=0,
        most=1,
    )
    delay: int = option(
        0,
        "Steps a global merge takes: the exchange between nodes runs beside so many steps of training, in which a "
        "node goes on from its own weights, and is applied after them. 0: everybody waits for it. Less than "
        "`local_every` and than the steps between two fragments.",
        least=0,
    )
    fragments: int = option(
        1,
        "Parts of the model, of about equal size, whose global merges are spread evenly over the window; divides "
        "`every`.",
        least=1,
    )
    path: str = option(
        "auto",
        "factor: exchange A and B between nodes; dense: reduce their product; auto: per layer, what sends fewer bytes.",
        one_of=("auto", "factor", "dense"),
    )
    precision: str = option(
        "fp32",
        "What crosses between nodes at a global merge: fp32, bf16, or int8 or int4 with a scale for 64 values. What a "
        "message misses goes with a later one, but for rounding A, on the factor path under `reset` (8 bits or more).",
        one_of=SENT,
    )
    tune: bool = option(
        False,
        "Measure a step and the link between nodes before a run's first step, and take from there the `precision`, "
        "`fragments` and `delay` with which steps wait less than 1 % of their time for it, at the least loss (what "
        "`plan --suggest` does with figures of yours). A run that is resumed keeps them.",
    )
    outer: str = option("average", "Outer optimizer over a window's change.", one_of=("average", "nesterov"))
    outer_lr: float = option(1.0, "Learning rate of the Nesterov outer optimizer.", above=0)
    outer_momentum: float = option(0.9, "Momentum of the Nesterov outer optimizer.", least=0, most=0.9999)
    weight_decay: float = option(
        0.0,
        "Decoupled decay of the master: a window multiplies it by 1 - weight_decay * (sum of its learning rates).",
        least=0,
    )
    optimizer_state: str = option(
        "keep",
        "The heads' optimizer state at a merge: kept, all reset, or that of B alone reset.",
        one_of=("keep", "reset", "reset_b"),
    )
    bucket_mb: float = option(64.0, "Upper size of one exchanged message, in MB, unless one layer is larger.", above=0)

    @property
    def cadence(self) -> Cadence:
        local = self.local_every or self.region_every or self.every
        return Cadence(self.every, local, self.fragments, self.delay, self.growth, self.region_every)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Sharded checkpoints."""

    every: str = option("1ep", "Steps or epochs between checkpoints; 0 means at the end alone.")
    keep_last: int = option(2, "How many of the latest checkpoints are kept.", least=1)
    keep_best: bool = option(True, "Also keep the checkpoint with the best eval_top1.")
    asynchronous: bool = option(True, "Write in the background while training goes on.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Progress, metrics.jsonl and the Prometheus endpoint."""

    every: int = option(10, "Steps between records.", least=1)
    port: int = option(
        0,
        "Port of the Prometheus endpoint of each node; 0 is off; a port in use moves on to the next.",
        least=0,
        most=65535,
    )
    address: str = option("127.0.0.1", "Address the endpoint listens on; 0.0.0.0 is every one of the machine.")
    job: str = option("", "Name of the run in Prometheus; empty takes the last part of run_dir.")
    discovery_dir: str = option(
        "", "Where every node writes its target for Prometheus's file_sd; empty is `endpoints` in the run directory."
    )
    certificate: str = option("", "PEM file that the endpoint serves HTTPS with; empty is HTTP.")
    key: str = option("", "Its private key, a PEM file; empty where the certificate's file holds it.")
    client_ca: str = option("", "PEM file of the authority that must have signed the client's certificate.")
    password_file: str = option("", "File with a line `user:password` that the endpoint asks for (basic auth).")
    pushgateway: str = option("", "URL of a Pushgateway that every node pushes to besides; empty is none.")
    push_seconds: float = option(15.0, "Seconds between pushes.", above=0)
    tensorboard: bool = option(False, "Write records to `tensorboard` in the run directory as well.")
    wandb: str = option("", "Project of Weights & Biases to write records for, offline; empty is none.")
    heads_every: int = option(
        100, "Steps between measurements of the heads' health, at a global merge; 0 is never.", least=0
    )
    peak_tflops: float = option(0.0, "Peak of one accelerator in TFLOP/s, for MFU; 0 looks its name up.", least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultToleranceConfig:
    """Nodes that are jobs of their own and outlive one another (docs/reliability.md)."""

    enabled: bool = option(
        False,
        "Every node is a job of its own, with a run_dir of its own, and merges with those that are there (torchft).",
    )
    lighthouse: str = option("", "Address of torchft's lighthouse, as http://head:29510.")
    nodes: int = option(1, "Nodes of the whole run, among which its data is divided.", least=1)
    node: int = option(0, "The number of this node, from 0.", least=0)
    wait_seconds: float = option(60.0, "Seconds to wait at the start for nodes that are not there yet.", least=0)
    timeout_seconds: float = option(
        60.0, "Seconds after which an exchange is tried again without a node that does not answer.", above=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """What ends a run that hangs."""

    seconds: float = option(
        300.0,
        "Silence after which every rank writes its stacks to `hangs` in the run directory, the log names the rank that "
        "others wait for, and the run ends for its scheduler to restart it; 0 is off. The first step, "
        "and a save that is waited for, have four times as long.",
        least=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """torch.profiler."""

    steps: str = option(
        "", "Steps to trace, as `100..110`; every rank writes a trace for Perfetto to `profile` in the run directory."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run."""

    run_dir: str = option("runs/default", "Directory of the run: configuration, metrics, checkpoints, events.")
    resume: str = option(
        "auto", "auto: from the latest checkpoint of the run, if any; never; or the path of a checkpoint."
    )
    method: str = option(
        "lte",
        "lte, or a baseline in the same trainer (docs/recipes.md): full (every weight trained, gradients averaged at "
        "every step), diloco (heads train every weight, merged by Nesterov), lora (one pair of factors for the whole "
        "run), relora (one pair, merged and begun anew). Sets some of the keys below.",
        one_of=("lte", "full", "diloco", "lora", "relora"),
    )
    seed: int = option(0, "Seed of weights, heads, data order and augmentation.", least=0, most=2**31 - 1)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
