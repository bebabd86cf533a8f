"""What a node checks by itself, and its report: one line of JSON for node 0."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lte_scale import __version__
from lte_scale.arrangement import FP32, Arrangement
from lte_scale.config.schema import Config
from lte_scale.cost import shapes_of
from lte_scale.index import ShardIndex, open_index
from lte_scale.memory import unsent_values
from lte_scale.model import attach, build
from lte_scale.preflight.place import Place, first_line
from lte_scale.reading import shard_samples
from lte_scale.run_dir import check_writable
from lte_scale.topology import Topology

_CLASSES = 1000
"""Where neither the configuration nor the data say how many: the size of one layer."""

_CHECKPOINTS = 2
"""Room for so many: the one that is kept while the next is written."""

_TEMPORARY_BYTES = 64 << 20
_NCCL_SHARED_BYTES = 32 << 20
"""Of /dev/shm, per rank on GPUs of one node."""

MATRIX = 64


@dataclass(slots=True, kw_only=True)
class Report:
    """What a node says of itself.

    Attributes:
        gpus: name and memory of each visible GPU.
        free: bytes free, by "run_dir", "temp", "shm".
        samples: by key of the configuration, "data.train" and "data.val".
        versions: of python, torch, ..., by name; the same on all nodes.
        driver: of the GPUs; may differ.
        failures: reasons, one line each.
    """

    host: str = field(default_factory=socket.gethostname)
    ranks: int = 0
    gpus: list[str] = field(default_factory=list)
    free: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    driver: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def gpu_text(self) -> str:
        return ", ".join(f"{count} x {name}" for name, count in Counter(self.gpus).items()) or "none"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Report:
        return Report(**json.loads(text))


def checkpoint_bytes(config: Config, topology: Topology) -> int:
    """About how large a checkpoint of this run is, all its files together.

    Raises:
        ValueError: if the model cannot be built or adapted.
    """
    model = build(config.model, config.model.num_classes or _CLASSES, seed=config.seed)
    with torch.device("meta"):
        heads = attach(model, config.adapters, topology.my_heads, seed=config.seed)
    a = Arrangement(shapes_of(heads), topology, config)
    shapes = a.shapes
    masters = 1 + (config.merge.outer == "nesterov") + (config.train.ema_decay > 0)
    by_node = topology.nodes + a.resetless if a.two_level else int(a.followed)
    weights = (masters + by_node) * sum(layer.values for layer in shapes.layers.values())
    earlier = sum(layer.factor_values for name, layer in shapes.layers.items() if a.paths[name] == "factor")
    # Parameters with AdamW's two moments.
    of_head = 3 * shapes.trainable_values + (shapes.factor_values if a.resetless else 0)
    of_head += (a.merges_sent - 1) * earlier
    unsent = topology.world_size * unsent_values(a, 0)
    return FP32 * (weights + masters * shapes.replica_values + topology.heads * of_head + unsent)


def uses_gpus(config: Config, gpus: int) -> bool:
    return config.train.device == "cuda" or (config.train.device == "auto" and gpus > 0)


class NodeCheck:
    """The checks of one node, in a thread: one that hangs, in a file system that does not answer, cannot be ended."""

    def __init__(self, config: Config, place: Place, topology: Topology, checkpoint: int) -> None:
        self.config, self.place, self.topology, self.checkpoint = config, place, topology, checkpoint
        self.at = ""
        self.report = Report(ranks=place.ranks)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def finish(self, seconds: float) -> Report:
        """The report after all checks, or after so many seconds."""
        until = time.monotonic() + seconds
        self.thread.start()
        while self.thread.is_alive() and time.monotonic() < until:
            self.thread.join(0.05)  # a longer one would hold up a signal
        report = Report.from_json(self.report.to_json())
        if self.hangs:
            report.failures.append(f"checks did not end within {seconds:.0f} s: the last one was {self.at!r}")
        return report

    @property
    def hangs(self) -> bool:
        return self.thread.is_alive()

    def _run(self) -> None:
        checks: dict[str, Callable[[], Iterator[str]]] = {
            "versions": self._versions,
            "gpus": self._gpus,
            "space": self._space,
            "run_dir": self._run_dir,
            "data": self._data,
        }
        for name, check in checks.items():
            self.at = name
            try:
                self.report.failures.extend(check())
            except Exception as error:
                # Whatever goes wrong here is a reason, not the end of the report.
                self.report.failures.append(f"{name}: {first_line(error)}")

    def _versions(self) -> Iterator[str]:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "lte-scale": __version__}
        self.report.versions = versions | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file():
            words = driver.read_text().splitlines()[0].split()
            self.report.driver = next((word for word in words if word[0].isdigit()), "")
        yield from ()

    def _gpus(self) -> Iterator[str]:
        if self.config.train.device == "cpu":
            return
        count, ranks = torch.cuda.device_count(), self.place.ranks
        for gpu in range(count):
            about = torch.cuda.get_device_properties(gpu)
            self.report.gpus.append(f"{about.name} {about.total_memory / 2**30:.0f} GiB")
        if not uses_gpus(self.config, count):
            return
        if count < ranks:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            limit = f"CUDA_VISIBLE_DEVICES={seen}" if seen is not None else "CUDA_VISIBLE_DEVICES is not set"
            yield f"{count} GPUs visible, {ranks} expected ({limit}); lower NPROC, or see nvidia-smi on this node"
        for gpu in range(min(count, ranks)):
            try:
                ones = torch.ones(MATRIX, MATRIX, device=f"cuda:{gpu}")
                total = (ones @ ones).sum().item()
                if total != MATRIX**3:
                    yield f"GPU {gpu} computes wrong: {total} instead of {MATRIX**3}; take it out of service"
            except RuntimeError as error:
                yield f"GPU {gpu} does not work ({first_line(error)}); see nvidia-smi and dmesg on this node"

    def _space(self) -> Iterator[str]:
        needed = {
            "run_dir": (Path(self.config.run_dir), _CHECKPOINTS * self.checkpoint),
            "temp": (Path(tempfile.gettempdir()), _TEMPORARY_BYTES),
            "shm": (Path("/dev/shm"), self._shared_bytes()),
        }
        for name, (path, need) in needed.items():
            while not path.exists() and path != path.parent:
                path = path.parent
            self.report.free[name] = free = free_bytes(path)
            if free < need:
                what, todo = {
                    "run_dir": (f"{_CHECKPOINTS} checkpoints need", "free some or choose another run_dir"),
                    "temp": ("temporary files need", "free some or set TMPDIR"),
                    "shm": (f"the loaders of {self.place.ranks} ranks need", "enlarge it or set data.workers=0"),
                }[name]
                yield f"{name}: {size(free)} free at {path}, {what} about {size(need)}; {todo}"

    def _shared_bytes(self) -> int:
        """Batches that data workers hand over through shared memory, and NCCL's own buffers."""
        c, ranks = self.config, self.place.ranks
        images = self.topology.heads_per_rank * c.train.batch_size // self.topology.ranks_per_head
        batch = FP32 * images * c.model.channels * c.model.image_size**2
        nccl = _NCCL_SHARED_BYTES if ranks > 1 and uses_gpus(c, len(self.report.gpus)) else 0
        return ranks * (c.data.workers * c.data.prefetch * batch + nccl)

    def _run_dir(self) -> Iterator[str]:
        if self.place.node == 0:
            check_writable(Path(self.config.run_dir))
        yield from ()

    def _data(self) -> Iterator[str]:
        for key, location in (("data.train", self.config.data.train), ("data.val", self.config.data.val)):
            if not location:
                continue
            try:
                index = open_index(location, allow_pipe=self.config.data.allow_pipe)
            except (OSError, ValueError) as error:
                yield f"{key}: {first_line(error)}"
                return  # the other split mostly lies beside it
            self.report.samples[key] = index.samples
            yield from (f"{key}: {reason}" for reason in _unreadable(index))


def _unreadable(index: ShardIndex) -> Iterator[str]:
    """Reads the first sample of the first and of the last shard."""
    shards = [shard for shard in index.shards if shard.samples]
    for shard in dict.fromkeys((shards[0], shards[-1])):
        for *_, damage in shard_samples(shard, [0], ""):
            if damage:
                yield f"{damage.name}; see that this node may read it"


def free_bytes(path: Path) -> int:
    """What a user may still write to the file system of `path`."""
    return shutil.disk_usage(path).free


def size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
