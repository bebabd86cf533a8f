"""Is it learning: overview, learning, heads. Queries are abbreviated as `panel.written` says."""

from __future__ import annotations

from panel import series, stat, table

OVERVIEW = [
    stat(
        "Progress",
        "Steps done, of those planned. Good: grows.",
        "max(lte_step{}) / max(lte_planned_steps{})",
        "percentunit",
    ),
    stat(
        "Ends in",
        "At the pace since the last start, without restarts and queues to come. Good: shrinks as time goes by.",
        "max(lte_remaining_seconds{})",
        "dtdurations",
    ),
    stat(
        "Training loss now", "Mean of the heads. Good: lower than an hour ago.", "avg(lte_loss{})", "none", decimals=3
    ),
    stat(
        "Held-out top-1 now",
        "Merged weights on the validation data. Good: higher at every evaluation.",
        "max(lte_eval_top1_ratio{})",
        "percentunit",
        decimals=2,
    ),
    stat(
        "Images per second now",
        "Of all nodes. Good: the same as in the first hour.",
        "sum(lte_images_per_second{})",
        "short",
    ),
    stat(
        "MFU now",
        "Model FLOP per second over the accelerators' peak. Good for a large ViT: 0.3 to 0.5. Empty on a CPU.",
        "avg(lte_mfu_ratio{})",
        "percentunit",
        decimals=1,
    ),
    stat(
        "Last step ended",
        "How long ago. Good: a few times a step. Ten minutes raise LteRunStalled.",
        "time() - max(lte_rank_step_timestamp_seconds{})",
        "s",
        orange=120,
        red=600,
    ),
    stat(
        "Not yet saved",
        "Work that a crash would cost now. Good: less than the time between two checkpoints.",
        'time() - max({__name__=~"lte_checkpoint_timestamp_seconds|lte_start_timestamp_seconds"})',
        "s",
        orange=3600,
        red=7200,
    ),
    stat(
        "Nodes down", "Endpoints that do not answer. Good: 0.", "count(up{} == 0) or vector(0)", "none", orange=1, red=1
    ),
    stat(
        "Waiting for data",
        "Share of the node that waits most, over 5 minutes. Good: under 5 %.",
        "max(node:lte_data_wait:ratio5m{})",
        "percentunit",
        orange=0.05,
        red=0.15,
        decimals=1,
    ),
    stat(
        "Merging",
        "Share of the time of steps. Good: under 10 %.",
        'sum(rate(lte_rank_phase_seconds_total{phase="merge"}[15m])) '
        '/ sum(rate(lte_rank_phase_seconds_total{phase!~"evaluate|checkpoint|record"}[15m]))',
        "percentunit",
        orange=0.1,
        red=0.2,
        decimals=1,
    ),
    stat(
        "Restarts",
        "Times the run was resumed from a checkpoint. Good: as many as you know of.",
        "max(lte_restarts{})",
        "none",
    ),
    table(
        "Alerts that fire",
        "Good: none. docs/runbook.md says what to do about each.",
        [("", 'ALERTS{alertstate="firing", job="$job", node=~"$node|"}', "none")],
        hidden=["Value", "__name__", "alertstate", "job"],
        renamed={"alertname": "alert"},
    ),
    table(
        "What runs",
        "Of each node. Good: all nodes the same.",
        [
            ("", "max by (node, run, model, engine, base_scope, rank, merge_every, heads) (lte_config_info{})", "none"),
            ("", "max by (node, version, torch, python, accelerator) (lte_build_info{})", "none"),
        ],
    ),
]

LEARNING = [
    series(
        "Training loss",
        "Good: falls, the heads close together. A head that leaves the others: section Heads.",
        [("avg(lte_loss{})", "mean"), ("max(lte_loss{})", "worst head"), ("min(lte_loss{})", "best head")],
        least=None,
    ),
    series(
        "Training top-1",
        "Good: rises. With mixup and label smoothing it stays below the held-out accuracy.",
        [
            ("avg(lte_top1_ratio{})", "mean"),
            ("max(lte_top1_ratio{})", "best head"),
            ("min(lte_top1_ratio{})", "worst head"),
        ],
        "percentunit",
    ),
    series(
        "Held-out accuracy",
        "Merged weights. Good: rises at every evaluation, the more the smaller the learning rate.",
        [("max(lte_eval_top1_ratio{})", "top-1"), ("max(lte_eval_top5_ratio{})", "top-5")],
        "percentunit",
    ),
    series(
        "Held-out loss",
        "Merged weights. Good: falls. Rising while the training loss falls: overfitting.",
        [("max(lte_eval_loss{})", "held-out"), ("avg(lte_loss{})", "training")],
        dashed=["training"],
        least=None,
    ),
    series(
        "Gradient norm",
        "Before clipping. Good: calm. Peaks of ten times the usual come before a diverging loss.",
        [("avg(lte_gradient_norm{})", "mean"), ("max(lte_gradient_norm{})", "worst head")],
        log=True,
    ),
    series(
        "Learning rate",
        "Of the factors. Good: what the schedule says, without a jump at a restart.",
        [("max(lte_learning_rate{})", "learning rate")],
        "sci",
    ),
]

HEADS = [
    series(
        "Loss of each head",
        "Good: all close together. One that leaves: a bad part of the data, or a head that diverges.",
        [("lte_loss{}", "head {{head}}")],
        least=None,
    ),
    series(
        "How far each head has moved",
        "Frobenius norm of what it has learned since its last merge. Good: alike. Five times the median "
        "raises LteHeadsDiverging.",
        [("lte_head_delta_norm{}", "head {{head}}")],
    ),
    series(
        "Farthest head over the median head",
        "Good: under 2.",
        [("max(lte_head_delta_norm{}) / quantile(0.5, lte_head_delta_norm{})", "farthest / median")],
        limit=5,
    ),
    series(
        "Cosine between heads",
        "Between what two heads of a node have learned. Good: well below 0.95, so that heads add to each "
        "other; near 1 they learn the same (LteHeadsCollapsing).",
        [("lte_head_cosine_mean{}", "node {{node}} mean"), ("lte_head_cosine_max{}", "node {{node}} largest")],
        least=None,
        limit=0.95,
    ),
    series(
        "Effective rank of a merge",
        "Directions that the merged change really has, a mean over sampled layers. Good: flat or rising.",
        [("lte_merged_delta_effective_rank{}", "node {{node}}")],
    ),
    series(
        "Share of the rank that is used",
        "Effective rank over the highest that these heads could reach. Good: flat. Falling towards 0.01: "
        "the heads collapse, or adapters.rank is more than needed.",
        [("lte_merged_delta_rank_ratio{}", "node {{node}}")],
        "percentunit",
        limit=0.01,
    ),
]
