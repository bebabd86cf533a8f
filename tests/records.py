"""A record with a value in every field."""

from __future__ import annotations

from lte_scale.metrics.record import Record

RECORD = Record(
    step=1200, epoch=3.21, images=153_600, loss=1.2344, top1=0.567, lr=1e-3, grad_norm=0.8, images_per_second=12_345.4,
    step_seconds=0.03, data_wait_seconds=1.5, merge_seconds=0.123, inter_node_bytes=4_700_000,
    intra_node_bytes=90_000_000, mfu=None, heads=8, skipped_steps=0, bad_samples=2, bad_shards=1, restarts=1,
    time=1.8e9, phase_seconds={"forward": 6.0, "backward": 3.0, "data_wait": 1.0},
    sent_bytes={"inter_node/merge_dense": 4_700_000, "intra_node/base": 90_000_000}, full_rank_bytes=940_000_000,
    memory_peak_bytes=2**30, head_loss=[1.2, 1.3], head_grad_norm=[0.7, 0.9],
)  # fmt: skip
