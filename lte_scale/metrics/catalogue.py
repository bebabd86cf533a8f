"""Every metric of a run: name, type, labels, meaning. The endpoint is built from this table, and so is docs/metrics.md.

Every series has the label `node`. Those without `local_rank` are the node's: sums of what its ranks count, or told by
its first rank. `python -m lte_scale.metrics.catalogue` prints the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SECONDS = (
    0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
PHASES = {
    "data_wait": "waiting for the next batch",
    "forward": "forward pass and loss, with gathering weights for it",
    "backward": "backward pass, with gathering weights for it",
    "collectives": "averaging gradients over the ranks of a head",
    "optimizer": "clipping and AdamW",
    "merge": "merging heads",
    "evaluate": "evaluation",
    "checkpoint": "copying for a checkpoint, and waiting for the one before",
    "record": "reducing and writing metrics",
}
STEP_PHASES = ("data_wait", "forward", "backward", "collectives", "optimizer")
"""Those of every step; the others come now and then."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels` are those besides `node`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


_SCOPES = "inter_node, intra_node"
METRICS: Mapping[str, Metric] = {
    # How far, how fast
    "lte_images_total": Metric("counter", "Images that the heads of this node have trained on."),
    "lte_steps_total": Metric("counter", "Optimizer steps."),
    "lte_windows_total": Metric("counter", "Windows: steps between two global merges."),
    "lte_step": Metric("gauge", "Optimizer step reached, counted from the start of the run."),
    "lte_planned_steps": Metric("gauge", "Optimizer steps of the whole run."),
    "lte_remaining_seconds": Metric("gauge", "Time to the end of the run at the pace since it was last started."),
    "lte_images_per_second": Metric("gauge", "Images per second of this node since the record before."),
    "lte_accelerator_images_per_second": Metric("gauge", "The same for one accelerator."),
    "lte_accelerators": Metric("gauge", "Ranks of this node, each with one accelerator (or none, on a CPU)."),
    "lte_model_flops_per_second": Metric("gauge", "Floating-point operations per second that the method needs."),
    "lte_accelerator_peak_flops_per_second": Metric("gauge", "Peak of one accelerator, where it is known."),
    "lte_mfu_ratio": Metric("gauge", "Model FLOP per second over the peak of the accelerators, where it is known."),
    # Where the time goes
    "lte_step_seconds": Metric("histogram", "Time of a step from end to end, without evaluation and checkpoint."),
    "lte_step_phase_seconds": Metric("histogram", "Time of a rank in a phase that every step has.", ("phase",)),
    "lte_rank_phase_seconds_total": Metric("counter", "Time of one rank in a phase.", ("local_rank", "phase")),
    "lte_merge_seconds": Metric(
        "histogram", "Time of a rank in the part of a merge that takes one path.", ("scope", "path")
    ),
    "lte_collective_seconds": Metric(
        "histogram", "Time from the start of a collective to its end; it may overlap computation.", ("scope", "purpose")
    ),
    "lte_network_bytes_total": Metric("counter", "Bytes sent by the collectives of this node.", ("scope", "purpose")),
    "lte_full_rank_bytes_total": Metric(
        "counter", "Bytes this node would have sent to others by full-rank DDP with fp32 gradients on as many steps."
    ),
    # Learning
    "lte_loss": Metric("gauge", "Training loss of a head, a mean since the record before.", ("head",)),
    "lte_top1_ratio": Metric("gauge", "Training top-1 accuracy of a head, likewise.", ("head",)),
    "lte_gradient_norm": Metric("gauge", "Gradient norm of a head before clipping, likewise.", ("head",)),
    "lte_learning_rate": Metric("gauge", "Learning rate of the factors."),
    "lte_eval_top1_ratio": Metric("gauge", "Held-out top-1 accuracy of the merged weights."),
    "lte_eval_top5_ratio": Metric("gauge", "Held-out top-5 accuracy of the merged weights."),
    "lte_eval_loss": Metric("gauge", "Held-out loss of the merged weights."),
    # Heads, measured before a global merge now and then (metrics.heads_every)
    "lte_head_delta_norm": Metric(
        "gauge", "Frobenius norm of what a head has learned since its last merge.", ("head",)
    ),
    "lte_head_cosine_mean": Metric("gauge", "Mean cosine between what two heads of the node have learned."),
    "lte_head_cosine_max": Metric("gauge", "Largest cosine between what two heads of the node have learned."),
    "lte_merged_delta_effective_rank": Metric(
        "gauge",
        "Effective rank (sum of squared singular values, squared, over that of their fourth powers) of the "
        "node's merged delta, a mean over sampled layers.",
    ),
    "lte_merged_delta_rank_ratio": Metric("gauge", "Effective rank over the highest that these heads could reach."),
    # Data and faults
    "lte_skipped_steps_total": Metric("counter", "Steps skipped for a loss or gradient that is not finite.", ("head",)),
    "lte_withdrawn_heads_total": Metric("counter", "Times a diverged head was left out of a merge.", ("head",)),
    "lte_bad_samples_total": Metric("counter", "Damaged samples skipped."),
    "lte_bad_shards_total": Metric("counter", "Shards found damaged as a whole, once per epoch."),
    "lte_restarts": Metric("gauge", "Times the run was resumed from a checkpoint."),
    "lte_start_timestamp_seconds": Metric("gauge", "When this process began, in Unix time."),
    "lte_rank_step": Metric("gauge", "Step that a rank has ended last.", ("local_rank",)),
    "lte_rank_step_timestamp_seconds": Metric("gauge", "When it has ended, in Unix time.", ("local_rank",)),
    "lte_checkpoints_total": Metric("counter", "Checkpoints, by how they ended.", ("result",)),
    "lte_checkpoint_step": Metric("gauge", "Step of the newest checkpoint."),
    "lte_checkpoint_timestamp_seconds": Metric("gauge", "When it was complete, in Unix time."),
    "lte_checkpoint_seconds": Metric("gauge", "Time from the start of writing it to its completion."),
    # Machine
    "lte_memory_bytes": Metric(
        "gauge", "Memory of a rank: its accelerator's, or on a CPU the process's.", ("local_rank", "kind")
    ),
    "lte_accelerator_power_watts": Metric("gauge", "Power drawn, where NVML offers it.", ("local_rank",)),
    "lte_accelerator_temperature_celsius": Metric("gauge", "Temperature, where NVML offers it.", ("local_rank",)),
    "lte_build_info": Metric("gauge", "Versions of what runs; 1.", ("version", "torch", "python", "accelerator")),
    "lte_config_info": Metric(
        "gauge", "What runs; 1.", ("run", "model", "engine", "base_scope", "rank", "merge_every", "heads")
    ),
}
LABELS: Mapping[str, str] = {
    "node": "number of the node",
    "local_rank": "rank within the node",
    "head": "number of the head in the run",
    "phase": ", ".join(PHASES),
    "scope": f"bytes and collectives: {_SCOPES}; merges: local (inside the node or region), global (over all nodes)",
    "path": "factor, dense (as merge.path), replica (parameters without factors), wait (for a merge with merge.delay)",
    "purpose": "what a collective is for: base, head_gradient, merge_factor, merge_dense, merge_replica, "
    "merge_region, merge_refresh, merge_check, merge_wait, evaluate, metrics, control",
    "result": "written, failed",
    "kind": "allocated, reserved, peak (of allocated); on a CPU allocated and peak are the process's resident memory",
}


def page() -> Iterator[str]:
    """The lines of docs/metrics.md."""
    yield "# Metrics"
    yield ""
    yield "<!-- generated: make docs -->"
    yield ""
    yield "What the Prometheus endpoint of a node serves (`metrics.port`), of all its ranks together. Every series has"
    yield "the label `node`, and from discovery `job`, the name of the run; those without `local_rank` are the node's."
    yield "Counters start from zero with every start of a run. How to look: [observability.md](observability.md)."
    yield ""
    yield "| metric | type | labels besides `node` | |"
    yield "|---|---|---|---|"
    for name, metric in METRICS.items():
        yield f"| `{name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
    yield ""
    yield "| label | values |"
    yield "|---|---|"
    for label, text in LABELS.items():
        yield f"| `{label}` | {text} |"
    yield ""
    yield "| phase | |"
    yield "|---|---|"
    for phase, text in PHASES.items():
        yield f"| `{phase}` | {text}{'' if phase in STEP_PHASES else '; not in every step'} |"
    yield ""
    yield f"Buckets of histograms, in seconds: {', '.join(f'{bound:g}' for bound in SECONDS)}."


if __name__ == "__main__":
    print("\n".join(page()))
