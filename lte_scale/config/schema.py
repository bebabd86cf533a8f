"""What can be configured: frozen dataclasses, one per section of the YAML file.

The text under a field is its documentation and `one_of`, `least` and `most` its range: the loader checks
them and the reference page is generated from them. Checks that span sections are in `checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lte_scale.config.learning import (
    AdaptersConfig,
    AugmentConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from lte_scale.config.operation import (
    CheckpointConfig,
    MetricsConfig,
    ProfileConfig,
    WatchdogConfig,
)
from lte_scale.config.options import (
    ConfigError,
    option,
)
from lte_scale.config.parallel import (
    BaseConfig,
    EngineConfig,
    FaultToleranceConfig,
    MergeConfig,
    TopologyConfig,
)

__all__ = [
    "AdaptersConfig",
    "AugmentConfig",
    "BaseConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FaultToleranceConfig",
    "MergeConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "TopologyConfig",
    "TrainConfig",
    "WatchdogConfig",
]


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
