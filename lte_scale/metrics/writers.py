"""Where records go besides metrics.jsonl: TensorBoard and Weights & Biases (offline), both packages optional."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from lte_scale.config.schema import MetricsConfig
from lte_scale.log import log
from lte_scale.metrics.record import Record

AXES = ("step", "time")  # what a curve is drawn over
FLUSH_SECONDS = 10


class Writer(Protocol):
    """Takes the records of a run, in order of their steps."""

    def write(self, record: Record) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget records after `step`: a resumed run writes them again."""

    def close(self) -> None: ...


def build_writers(config: MetricsConfig, run_dir: Path, run_name: str, settings: Mapping[str, Any]) -> list[Writer]:
    """The writers that the configuration asks for besides metrics.jsonl. `settings`: the whole configuration.

    None of them ever raises: the first failure is said once, and nothing is written there from then on.

    Raises:
        ValueError: if a package is missing or broken.
    """
    check_installed(config)
    writers: list[Writer] = []
    if config.tensorboard:
        writers.append(_Forgiving("metrics.tensorboard", TensorboardWriter(run_dir / "tensorboard", settings)))
    if config.wandb:
        writers.append(_Forgiving("metrics.wandb", WandbWriter(config.wandb, run_dir, run_name, settings)))
    return writers


def check_installed(config: MetricsConfig) -> None:
    """
    Raises:
        ValueError: if a package that the configuration asks for is missing.
    """
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and not _installed(package):
            raise ValueError(
                f"metrics.{package}: needs the package {package}; install it with pip install 'lte-scale[{package}]'"
            )


def _installed(package: str) -> bool:
    # A folder of that name where python was started, such as wandb's own, is found too, but has no origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The figures of a record, nested ones as `phase_seconds/forward` and `head_loss/0`; none for what is None."""
    for field in fields(record):
        if field.name not in AXES:
            yield from _flat(field.name, getattr(record, field.name))


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}/{index}", inner)
    elif value is not None:
        yield name, value


class TensorboardWriter:
    """Event files in `folder`, the settings under Text. A file is begun by the first record."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: if the package is broken.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:
            raise _broken("tensorboard", error) from error
        self.folder, self.settings = folder, settings
        self._open: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, record: Record) -> None:
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=self._purge_step, flush_secs=FLUSH_SECONDS)
            text = "\n".join("    " + line for line in json.dumps(self.settings, indent=2, default=str).splitlines())
            self._writer.add_text("settings", text, record.step, walltime=record.time)
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record.step, walltime=record.time)

    def rewind(self, step: int) -> None:
        """The next file tells TensorBoard to leave out what earlier ones have after `step`."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


class WandbWriter:
    """An offline run in `run_dir`/wandb, begun by the first record; `wandb sync` uploads it, whenever that suits.

    W&B takes no step twice, so that a resumed run is one more W&B run, `NAME from step N`, in the same group.
    """

    def __init__(self, project: str, run_dir: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: if the package is broken.
        """
        # Even of an offline run it would report its own use to the vendor, and look that host's name up to do so.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except Exception as error:
            raise _broken("wandb", error) from error
        self.project, self.run_dir, self.run_name, self.settings = project, run_dir, run_name, settings
        self._wandb: Any = wandb
        self._run: Any = None
        self._from = ""

    def write(self, record: Record) -> None:
        if self._run is None:
            # wandb makes it as well, but would go to the system's temporary directory where it cannot
            (self.run_dir / "wandb").mkdir(parents=True, exist_ok=True)
            self._run = self._wandb.init(
                project=self.project,
                name=self.run_name + self._from,
                group=self.run_name,
                dir=str(self.run_dir),
                config=dict(self.settings),
                mode="offline",
                reinit="create_new",
                settings=self._wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
            )
        self._run.log(dict(scalars(record)), step=record.step, commit=True)

    def rewind(self, step: int) -> None:
        """The next record begins a run of its own."""
        self.close()
        self._from = f" from step {step}" if step else ""

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _broken(package: str, error: Exception) -> ValueError:
    return ValueError(
        f"metrics.{package}: the package {package} does not load ({_one_line(error)}); "
        f"install it anew with pip install 'lte-scale[{package}]'"
    )


class _Forgiving:
    """A writer that ends with its first failure, where training goes on."""

    def __init__(self, key: str, writer: Writer) -> None:
        self.key, self.writer = key, writer
        self.failed = False

    def write(self, record: Record) -> None:
        self._try(lambda: self.writer.write(record))

    def rewind(self, step: int) -> None:
        self._try(lambda: self.writer.rewind(step))

    def close(self) -> None:
        self._try(self.writer.close)

    def _try(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # of a library that training does not depend on
            self.failed = True
            log.warning("%s: %s; nothing is written there from here on", self.key, _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
