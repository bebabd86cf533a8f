"""Sections on running it: checkpoints, metrics, what ends a run that hangs, profiles."""

from __future__ import annotations

from dataclasses import dataclass

from lte_scale.config.options import option


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
