"""What a run says: readable lines on the terminal, dated lines in the run directory's events.log.

`log` takes events: a checkpoint written, a sample skipped, a signal. Terminal and events.log.
`progress` takes the line of every record. Terminal alone, since metrics.jsonl holds the same.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import datetime
from pathlib import Path

log = logging.getLogger("lte_scale")
progress = logging.getLogger("lte_scale.progress")


def setup(rank: int, run_dir: Path | None, *, node: int = 0) -> None:
    """Start logging in this process, in place of an earlier `setup`.

    Rank 0 says INFO and above, other ranks WARNING and above after `[node 1 rank 3]`: on stderr and, with a run
    directory (created where missing), in its `events.log`.

    Raises:
        ValueError: if `events.log` cannot be written.
    """
    level = logging.INFO if rank == 0 else logging.WARNING
    handlers: list[logging.Handler] = [_Terminal("" if rank == 0 else f"[node {node} rank {rank}] ")]
    if run_dir is not None:
        handlers.append(_Events(run_dir / "events.log", rank))
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setLevel(level)
        log.addHandler(handler)
    log.setLevel(logging.INFO)


class _Terminal(logging.Handler):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        try:
            kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            # One write per line keeps the lines of several ranks on one terminal whole.
            sys.stderr.write(f"{self.prefix}{kind}{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Events(logging.Handler):
    """One line per event: ISO time, rank, level, message. One appending write, so that ranks never interleave."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self.rank = rank
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ValueError(
                f"run_dir: cannot write {path} ({error.strerror}); choose a directory you may write to"
            ) from error
        self.addFilter(lambda record: record.name != progress.name)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
            message = self.format(record).replace("\n", "\\n")
            os.write(self.descriptor, f"{time} rank {self.rank} {record.levelname.lower()} {message}\n".encode())
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        super().close()
