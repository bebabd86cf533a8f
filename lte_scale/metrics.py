"""The figures of a run and where they go: metrics.jsonl, the progress line, a node's Prometheus endpoint."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from lte_scale.log import log

PORTS_TRIED = 100
STEP_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# Metric name (without `lte_`): field of the record, help text.
COUNTERS = {
    "images": ("images", "Images trained on, by all heads."),
    "steps": ("step", "Optimizer steps."),
    "data_wait_seconds": ("data_wait_seconds", "Seconds spent waiting for data."),
    "skipped_steps": ("skipped_steps", "Steps of a head skipped for a non-finite loss or gradient."),
    "bad_samples": ("bad_samples", "Damaged samples skipped."),
}
GAUGES = {
    "step": ("step", "Optimizer step reached, counted from the start of the run."),
    "images_per_second": ("images_per_second", "Images per second of the whole run."),
    "loss": ("loss", "Training loss."),
    "top1_ratio": ("top1", "Training top-1 accuracy."),
    "learning_rate": ("lr", "Learning rate of the factors."),
    "gradient_norm": ("grad_norm", "Gradient norm, averaged over heads."),
    "mfu_ratio": ("mfu", "Model FLOP per second over the peak of the accelerators."),
    "eval_top1_ratio": ("eval_top1", "Held-out top-1 accuracy of the merged weights."),
    "eval_top5_ratio": ("eval_top5", "Held-out top-5 accuracy of the merged weights."),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of metrics.jsonl. Seconds, bytes, ratios of 1; counters are cumulative over the whole run.

    Attributes:
        loss, top1, grad_norm: training loss, top-1 ratio and gradient norm, averaged over `heads` heads and the steps
            since the previous record.
        images_per_second, step_seconds: over the same steps, of the whole run.
        images, data_wait_seconds, merge_seconds, inter_node_bytes, intra_node_bytes, skipped_steps, bad_samples:
            counters.
        mfu: model FLOP per second over the peak; None where the peak is unknown.
        eval_top1, eval_top5, eval_loss: held-out figures; None, and left out of the file, where none were taken.
    """

    step: int
    epoch: float
    images: int
    loss: float
    top1: float
    lr: float
    grad_norm: float
    images_per_second: float
    step_seconds: float
    data_wait_seconds: float
    merge_seconds: float
    inter_node_bytes: int
    intra_node_bytes: int
    mfu: float | None
    heads: int
    skipped_steps: int
    bad_samples: int
    eval_top1: float | None = None
    eval_top5: float | None = None
    eval_loss: float | None = None


class JsonlWriter:
    """Appends one JSON object per record; a reader sees whole lines only, but for a last one torn by a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        """Append a record. Non-finite floats become null, which JSON has no other word for."""
        values: dict[str, Any] = asdict(record)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {k: v for k, v in finite.items() if not (k.startswith("eval_") and values[k] is None)}
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def rewind(self, step: int) -> None:
        """Forget records after `step`, and torn lines: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines() if _step_of(line) <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def format_progress(record: Record, total_steps: int, seconds_left: float) -> str:
    """The line that shows a record: what was learnt, how fast, what merges took and sent so far, what remains."""
    total = f"{total_steps:,}"
    parts = [
        f"step {record.step:>{len(total)},}/{total}",
        f"epoch {record.epoch:.1f}",
        f"loss {record.loss:.3f}",
        f"top-1 {100 * record.top1:4.1f} %",
        f"{record.images_per_second:,.0f} images/s",
        f"merge {record.merge_seconds:.2f} s",
        f"inter-node {_bytes(record.inter_node_bytes)}",
        f"left {_clock(seconds_left)}",
    ]
    if record.eval_top1 is not None:
        parts.append(f"| eval top-1 {100 * record.eval_top1:.1f} %")
    if record.eval_top5 is not None:
        parts.append(f"top-5 {100 * record.eval_top5:.1f} %")
    if record.eval_loss is not None:
        parts.append(f"loss {record.eval_loss:.3f}")
    return "  ".join(parts)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.95 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Endpoint:
    """The Prometheus endpoint of a node, served by its local rank 0 from a daemon thread.

    Names follow prometheus.io/docs/practices/naming; `node` labels every series. Counters count what this process
    did: they start at zero, also in a resumed run, as Prometheus expects of a process that started anew. A gauge
    appears with its first value. Where it listens is in `run_dir/endpoints/node<N>` as host:port until `close`.
    """

    def __init__(self, address: str, port: int, *, node: int, run_dir: Path) -> None:
        """Listen on `address` and the first free port from `port` on; 0 lets the system choose.

        Raises:
            ValueError: if the address is not of this machine, or none of the next 100 ports is free.
        """
        # The creation time of each counter, a second series per counter, says nothing that `up` does not.
        cast(Callable[[], None], disable_created_metrics)()
        self.registry = CollectorRegistry()
        self.node = str(node)
        self._before: dict[str, float] = {}
        self._step = 0
        self._define()
        self._server, self._thread, self.port = self._listen(address, port)
        host = socket.gethostname() if address in ("", "0.0.0.0", "::") else address
        self.host_port = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._file = run_dir / "endpoints" / f"node{node}"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(self.host_port + "\n")
        if port and self.port != port:
            log.warning("metrics.port %d is in use: node %d serves http://%s/metrics", port, node, self.host_port)
        else:
            log.info("node %d serves http://%s/metrics", node, self.host_port)

    def _define(self) -> None:
        self._counters = {field: self._counter(name, text) for name, (field, text) in COUNTERS.items()}
        self._gauges = {
            field: Gauge(f"lte_{name}", text, ["node"], registry=self.registry)
            for name, (field, text) in GAUGES.items()
        }
        self._merges = self._counter("merges", "Merges of heads, inside the node (local) or over all nodes.", "scope")
        self._merge_seconds = self._counter("merge_seconds", "Seconds spent merging.", "scope")
        self._sent = self._counter("network_bytes", "Bytes sent by this rank's collectives.", "scope", "purpose")
        text = "Seconds per step: the mean between two records, counted once for each of their steps."
        self._step_seconds = Histogram(
            "lte_step_seconds", text, ["node"], registry=self.registry, buckets=STEP_SECONDS_BUCKETS
        )
        build = Gauge("lte_build_info", "Versions of what runs.", ["node", "version", "torch"], registry=self.registry)
        build.labels(self.node, _version("lte-scale"), _version("torch")).set(1)
        # A counter that is there from the start lets rate() see its first increase.
        for counter in self._counters.values():
            counter.labels(self.node)
        for scope in ("local", "global"):
            self._merges.labels(self.node, scope)
            self._merge_seconds.labels(self.node, scope)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lte_{name}", text, ["node", *labels], registry=self.registry)

    def _listen(self, address: str, port: int) -> tuple[Any, Any, int]:
        last = min(port + PORTS_TRIED, 65535) if port else 0
        for candidate in range(port, last + 1):
            try:
                server, thread = start_http_server(candidate, address, self.registry)
                return server, thread, server.server_port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ValueError(
                        f"metrics.address: cannot listen on {address}:{candidate} ({error.strerror or error}); "
                        "use 127.0.0.1, 0.0.0.0 or an address of this machine, and a port from 1024 on"
                    ) from error
        raise ValueError(f"metrics.port: {port} to {last} are all in use on {address}; choose another, or 0 for none")

    def resume(self, **counted: float) -> None:
        """Leave out of the counters what earlier parts of the run have counted, by the names of a record's counters.

        Call before the first `update`: `endpoint.resume(step=1000, images=128_000, data_wait_seconds=3.5, ...)`.
        """
        self._step = int(counted.get("step", 0))
        self._before |= counted

    def merged(self, scope: Literal["local", "global"], seconds: float) -> None:
        """Count a merge."""
        self._merges.labels(self.node, scope).inc()
        self._merge_seconds.labels(self.node, scope).inc(seconds)

    def update(self, record: Record, bytes_sent: Mapping[tuple[str, str], int]) -> None:
        """Show a record, and the bytes that this rank has sent so far by (scope, purpose)."""
        for field, counter in self._counters.items():
            self._advance(counter.labels(self.node), field, getattr(record, field))
        for (scope, purpose), total in bytes_sent.items():
            self._advance(self._sent.labels(self.node, scope, purpose), f"{scope}/{purpose}", total)
        for _ in range(record.step - self._step):
            self._step_seconds.labels(self.node).observe(record.step_seconds)
        self._step = record.step
        for field, gauge in self._gauges.items():
            value = getattr(record, field)
            if value is not None:
                gauge.labels(self.node).set(value)

    def _advance(self, counter: Counter, name: str, total: float) -> None:
        before = self._before.get(name, 0.0)
        counter.inc(max(0.0, total - before))
        self._before[name] = max(before, total)

    def close(self) -> None:
        """Stop serving and free the port. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# Dense bf16 tensor peaks in TFLOP/s from the vendors' data sheets (fp16 where a device has no bf16), for one device as
# torch counts them: a die of MI250X. All words of a key occur in the device's name; the first match wins.
_PEAKS = {
    "gb300": 2500.0, "b300": 2250.0, "gb200": 2500.0, "b200": 2250.0, "gh200": 989.4, "h200 nvl": 835.5, "h200": 989.4,
    "h100 pcie": 756.0, "h100 nvl": 835.5, "h100": 989.4, "h800 pcie": 756.0, "h800": 989.4, "h20": 148.0,
    "a100": 312.0, "a800": 312.0, "a40": 149.7, "a30": 165.0, "a10g": 70.0, "a10": 125.0, "a6000": 154.8,
    "l40s": 362.0, "l40": 181.0, "l4": 121.0, "v100": 125.0, "t4": 65.0, "6000 ada": 364.2, "5090": 209.5,
    "4090": 165.2, "3090": 71.0, "mi355x": 2500.0, "mi325x": 1307.4, "mi300x": 1307.4, "mi250x": 191.5, "mi250": 181.0,
    "mi210": 181.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Peak of an accelerator by the name its driver gives, in TFLOP/s; None where it is unknown."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if "laptop" in words:
        return None
    return next((peak for key, peak in _PEAKS.items() if words.issuperset(key.split())), None)
