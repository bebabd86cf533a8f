"""Is it fast: throughput, anatomy of a step, network. Queries are abbreviated as `panel.written` says."""

from __future__ import annotations

from panel import bars, heatmap, series, stat

THROUGHPUT = [
    series(
        "Images per second",
        "Good: flat, the nodes alike.",
        [("sum(lte_images_per_second{})", "all nodes"), ("lte_images_per_second{}", "node {{node}}")],
        "short",
    ),
    series(
        "Images per second of an accelerator",
        "Good: all nodes on one line.",
        [("lte_accelerator_images_per_second{}", "node {{node}}")],
        "short",
    ),
    series(
        "MFU",
        "Good for a large ViT: 0.3 to 0.5, and flat. It needs a known peak (metrics.peak_tflops).",
        [("lte_mfu_ratio{}", "node {{node}}")],
        "percentunit",
    ),
    series(
        "FLOP per second",
        "What the method needs, against what the accelerators could do. Good: flat.",
        [
            ("sum(lte_model_flops_per_second{})", "model"),
            ("sum(lte_accelerators{} * lte_accelerator_peak_flops_per_second{})", "peak"),
        ],
        "flops",
        dashed=["peak"],
        log=True,
    ),
    series(
        "Step time",
        "Good: the 95th percentile close to the median. Merges make some steps longer.",
        [
            ("histogram_quantile(0.5, sum by (le) (rate(lte_step_seconds_bucket{}[])))", "median"),
            ("histogram_quantile(0.95, sum by (le) (rate(lte_step_seconds_bucket{}[])))", "95 %"),
        ],
        "s",
    ),
    series(
        "Step reached",
        "Good: a straight line. Steps back are restarts.",
        [("max(lte_step{})", "reached"), ("max(lte_planned_steps{})", "planned")],
        dashed=["planned"],
    ),
    heatmap(
        "Step time, all steps",
        "Good: one band, and a second thin one for steps with a merge.",
        "sum by (le) (increase(lte_step_seconds_bucket{}[]))",
        "s",
        width=16,
    ),
    series("Time to the end", "Good: falls as fast as time goes by.", [("max(lte_remaining_seconds{})", "left")], "s"),
]

STEP = [
    series(
        "Phases of a step",
        "Mean seconds of a rank in a step; what comes now and then is spread over all steps. Good: forward "
        "and backward are nearly all of it.",
        [
            (
                "sum by (phase) (rate(lte_rank_phase_seconds_total{}[])) "
                "/ on () group_left () sum(rate(lte_steps_total{}[]) * lte_accelerators{})",
                "{{phase}}",
            )
        ],
        "s",
        stacked=True,
        width=12,
    ),
    bars(
        "Where the time goes",
        "Share of each phase over the range of time shown. Good: backward and forward lead.",
        [
            (
                "sort_desc(sum by (phase) (increase(lte_rank_phase_seconds_total{}[$__range])) "
                "/ on () group_left () sum(increase(lte_rank_phase_seconds_total{}[$__range])))",
                "{{phase}}",
            )
        ],
        "percentunit",
        width=12,
    ),
    series(
        "Between the fastest rank and the slowest",
        "Seconds per second that they differ by in a phase. Good: near 0. In forward and backward: a slow "
        "accelerator. In collectives and merge: the fast ones wait for the slow one.",
        [
            (
                "max by (phase) (rate(lte_rank_phase_seconds_total{}[])) "
                "- min by (phase) (rate(lte_rank_phase_seconds_total{}[]))",
                "{{phase}}",
            )
        ],
    ),
    series(
        "Time of a merge",
        "Mean of a rank, by scope and path. Good: local far below global, both flat.",
        [
            (
                "sum by (scope, path) (rate(lte_merge_seconds_sum{}[])) "
                "/ sum by (scope, path) (rate(lte_merge_seconds_count{}[]))",
                "{{scope}} {{path}}",
            )
        ],
        "s",
    ),
    series(
        "Now and then",
        "Share of the time spent outside plain steps. Good: a few percent each; a checkpoint next to nothing when "
        "asynchronous.",
        [
            (
                'avg by (phase) (rate(lte_rank_phase_seconds_total{phase=~"merge|evaluate|checkpoint|record"}[]))',
                "{{phase}}",
            )
        ],
        "percentunit",
    ),
]

NETWORK = [
    series(
        "Bytes between nodes",
        "Against what full-rank DDP with fp32 gradients would send on as many steps. Good: peaks at global "
        "merges, nothing between them, far below the dashed line.",
        [
            ('sum(rate(lte_network_bytes_total{scope="inter_node"}[]))', "LTE"),
            ("sum(rate(lte_full_rank_bytes_total{}[]))", "full-rank DDP"),
        ],
        "Bps",
        dashed=["full-rank DDP"],
        log=True,
        width=12,
    ),
    series(
        "Bytes by scope",
        "Sent by all nodes. Good: inter_node, the slow network, a fraction of intra_node.",
        [
            ("sum by (scope) (rate(lte_network_bytes_total{}[]))", "{{scope}}"),
            ("sum(rate(lte_full_rank_bytes_total{}[]))", "full-rank DDP, between nodes"),
        ],
        "Bps",
        dashed=["full-rank DDP, between nodes"],
        log=True,
        width=12,
    ),
    series(
        "Between nodes, by purpose",
        "Good: merge_*, and little else.",
        [('sum by (purpose) (rate(lte_network_bytes_total{scope="inter_node"}[]))', "{{purpose}}")],
        "Bps",
        stacked=True,
    ),
    series(
        "Inside the nodes, by purpose",
        "base: gathering weights, in every pass or once per window (base.gather). Good: flat.",
        [('sum by (purpose) (rate(lte_network_bytes_total{scope="intra_node"}[]))', "{{purpose}}")],
        "Bps",
        stacked=True,
    ),
    series(
        "Time of a collective",
        "Mean from its start to its end; it may overlap computation, and it includes waiting for the last "
        "rank to come. Good: flat.",
        [
            (
                "sum by (scope, purpose) (rate(lte_collective_seconds_sum{}[])) "
                "/ sum by (scope, purpose) (rate(lte_collective_seconds_count{}[]))",
                "{{scope}} {{purpose}}",
            )
        ],
        "s",
        log=True,
    ),
    stat(
        "Fewer bytes than full-rank DDP",
        "Over the range of time shown. Good: 10 and more. Empty on one node.",
        "sum(increase(lte_full_rank_bytes_total{}[$__range])) "
        '/ sum(increase(lte_network_bytes_total{scope="inter_node"}[$__range]))',
        "suffix:x",
        decimals=1,
        width=8,
    ),
    stat(
        "Sent between nodes",
        "Over the range of time shown. Good: what lte-scale plan says per merge, times the merges.",
        'sum(increase(lte_network_bytes_total{scope="inter_node"}[$__range]))',
        "decbytes",
        width=8,
    ),
    stat(
        "Full-rank DDP would have sent",
        "Between nodes, over the range of time shown. Good: far more than what was sent.",
        "sum(increase(lte_full_rank_bytes_total{}[$__range]))",
        "decbytes",
        width=8,
    ),
]
