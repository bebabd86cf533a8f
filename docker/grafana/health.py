"""Is it well: data, faults, nodes side by side. Queries are abbreviated as `panel.written` says."""

from __future__ import annotations

from panel import bars, series, table, timeline

DATA = [
    series(
        "Share of time waiting for data",
        "Good: under 5 %. Over 15 % LteDataBound fires.",
        [("node:lte_data_wait:ratio5m{}", "node {{node}}")],
        "percentunit",
        limit=0.15,
    ),
    series(
        "Wait for a batch",
        "95th percentile. Good: a millisecond or less. Peaks: a slow file system or a cold cache.",
        [
            (
                "histogram_quantile(0.95, sum by (node, le) "
                '(rate(lte_step_phase_seconds_bucket{phase="data_wait"}[])))',
                "node {{node}}",
            )
        ],
        "s",
    ),
    series(
        "Wait of each rank",
        "Seconds per second. Good: alike. One rank alone: its loaders lack CPU cores.",
        [('rate(lte_rank_phase_seconds_total{phase="data_wait"}[])', "node {{node}} rank {{local_rank}}")],
    ),
    series(
        "Images read",
        "Per second, over 5 minutes. Good: flat, the nodes alike.",
        [("node:lte_images:rate5m{}", "node {{node}}")],
        "short",
    ),
    series(
        "Damaged samples",
        "Share of those read, over 15 minutes. Good: 0. Over 0.1 % LteBadSamples fires; at "
        "data.max_bad_ratio the run saves and ends.",
        [("node:lte_bad_samples:ratio15m{}", "node {{node}}")],
        "percentunit",
        limit=0.001,
    ),
    series(
        "Damaged shards",
        "Since the process began, once per epoch each. Good: 0. events.log names them.",
        [("lte_bad_shards_total{}", "node {{node}}")],
    ),
]

FAULTS = [
    timeline(
        "Endpoints",
        "Good: up throughout. A gap: the run was ended and started again.",
        ("max by (node) (up{})", "node {{node}}"),
        {"0": ("down", "red"), "1": ("up", "green")},
    ),
    series(
        "Since the last step",
        "Of each node's slowest rank. Good: a few times a step. All nodes rise: a hang. One rises first: it "
        "is the one to look at.",
        [("time() - min by (node) (lte_rank_step_timestamp_seconds{})", "node {{node}}")],
        "s",
        limit=600,
    ),
    series(
        "Steps behind the foremost rank",
        "Good: 0 inside a node, less than merge.every between nodes. In a hang: the rank that did not arrive.",
        [("scalar(max(lte_rank_step{})) - lte_rank_step{}", "node {{node}} rank {{local_rank}}")],
    ),
    series(
        "Skipped steps, withdrawn heads",
        "In 10 minutes: steps for a loss or gradient that is not finite, heads for a loss that has multiplied. "
        "Good: 0.",
        [
            ("sum by (head) (increase(lte_skipped_steps_total{}[10m]))", "head {{head}}"),
            ("sum by (head) (increase(lte_withdrawn_heads_total{}[10m]))", "head {{head}} withdrawn"),
        ],
    ),
    series(
        "Starts in an hour",
        "Of each node's process. Good: 0. Three raise LteCrashLoop.",
        [("changes(node:lte_start_timestamp_seconds:max{}[1h])", "node {{node}}")],
        limit=3,
    ),
    series(
        "Checkpoints in an hour",
        "Good: none failed.",
        [("sum by (result) (increase(lte_checkpoints_total{}[1h]))", "{{result}}")],
    ),
    series(
        "Not yet saved, over time",
        "Good: a saw with even teeth, below the dashed line.",
        [('time() - max({__name__=~"lte_checkpoint_timestamp_seconds|lte_start_timestamp_seconds"})', "not yet saved")],
        "s",
        limit=7200,
    ),
    series(
        "Time to write a checkpoint",
        "In the background, when asynchronous. Good: flat, and far less than the time between two.",
        [("max(lte_checkpoint_seconds{})", "to write")],
        "s",
    ),
    series(
        "Step of the newest checkpoint",
        "Good: close behind the step reached.",
        [("max(lte_checkpoint_step{})", "saved"), ("max(lte_step{})", "reached")],
        dashed=["reached"],
    ),
]

NODES = [
    table(
        "Nodes side by side",
        "Good: every column the same from top to bottom. Click a column's head to sort by it.",
        [
            ("", "max by (node, instance) (up{})", "none"),
            ("images/s", "sum by (node) (lte_images_per_second{})", "short"),
            ("median step", "histogram_quantile(0.5, sum by (node, le) (rate(lte_step_seconds_bucket{}[])))", "s"),
            ("compute over median", "max by (node) (node:lte_compute:over_median5m{})", "none"),
            ("data wait", "max by (node) (node:lte_data_wait:ratio5m{})", "percentunit"),
            ("peak memory", 'max by (node) (lte_memory_bytes{kind="peak"})', "bytes"),
            ("last step ago", "time() - min by (node) (lte_rank_step_timestamp_seconds{})", "s"),
            ("power", "sum by (node) (lte_accelerator_power_watts{})", "watt"),
            ("hottest", "max by (node) (lte_accelerator_temperature_celsius{})", "celsius"),
            ("started", "1000 * max by (node) (lte_start_timestamp_seconds{})", "dateTimeFromNow"),
        ],
        renamed={"instance": "endpoint"},
        size=(24, 8),
    ),
    series(
        "Compute of a node against its peers",
        "Forward and backward pass of its slowest rank, over the median rank of the run. Good: under 1.1. "
        "Over 1.2 LteNodeSlow fires.",
        [("node:lte_compute:over_median5m{}", "node {{node}}")],
        least=None,
        limit=1.2,
    ),
    bars(
        "Slowest ranks",
        "Forward and backward pass of a step, the eight slowest. Good: alike. One that stands out: "
        "throttled, or its GPU is shared.",
        [("topk(8, rank:lte_compute_seconds:mean5m{})", "node {{node}} rank {{local_rank}}")],
        "s",
    ),
    series(
        "Mean step of each node",
        "Good: the same everywhere. Nodes meet at merges, so it hides who is slow: see left.",
        [("node:lte_step_seconds:mean5m{}", "node {{node}}")],
        "s",
    ),
    series(
        "Memory",
        "Of the fullest rank of a node. Good: flat. Rising without end: a leak.",
        [("max by (node, kind) (lte_memory_bytes{})", "node {{node}} {{kind}}")],
        "bytes",
    ),
    series(
        "Power",
        "Of a node's accelerators, where NVML tells. Good: alike. Much less than its peers': throttled or waiting.",
        [("sum by (node) (lte_accelerator_power_watts{})", "node {{node}}")],
        "watt",
    ),
    series(
        "Temperature",
        "Of a node's hottest accelerator. Good: steady; most GPUs throttle between 83 and 90 degrees.",
        [("max by (node) (lte_accelerator_temperature_celsius{})", "node {{node}}")],
        "celsius",
        least=None,
    ),
]
