"""`lte-scale top`: the live state of a run, from the Prometheus endpoints of its nodes."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from lte_scale.top.node import Reading
from lte_scale.top.scrape import Fetcher, Scrape, Target, find
from lte_scale.top.view import lines

OVER_SECONDS = 60.0
THREADS = 32
PIPE_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lte-scale top`."""
    parser.add_argument(
        "targets", nargs="+", metavar="TARGET", help="directory of a run, or host:9464, http://host:9464/metrics, ..."
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (default 2)")
    parser.add_argument("--once", action="store_true", help="show it once, as where the output is no terminal")
    parser.add_argument(
        "--over",
        type=float,
        metavar="S",
        help=f"seconds that times and bytes are taken over (default {OVER_SECONDS:.0f}; once: since the start)",
    )
    parser.add_argument(
        "--timeout", type=float, default=3.0, metavar="S", help="seconds to wait for a node (default 3)"
    )
    parser.add_argument("--cafile", metavar="PEM", help="certificates to trust for https")
    parser.add_argument("--cert", metavar="PEM", help="certificate and key, where a node asks for one")
    parser.add_argument("--password-file", metavar="FILE", help="a line user:password, where a node asks for it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`lte-scale top`. Returns the exit code; Ctrl-C ends it with 0.

    Raises:
        ValueError: for what a user can mend; to show it once, also if no target answers.
    """
    for option in ("every", "over", "timeout"):
        value = getattr(args, option)
        if value is not None and not 0 < value < 1e6:
            raise ValueError(f"--{option}: {value:g} is no number of seconds; give one above 0")
    targets = find(args.targets)
    once = args.once or not sys.stdout.isatty()
    fetcher = Fetcher(args.timeout, args.cafile, args.cert, args.password_file)
    watch = Watch(fetcher, args.over or (0.0 if once else OVER_SECONDS))
    try:
        if once:
            _show_once(watch, targets, args.over or 0.0)
        else:
            _show_live(watch, args.targets, targets, args.every)
    except KeyboardInterrupt:
        pass
    finally:
        watch.close()
    return 0


class Watch:
    """Scrapes of targets, kept for as long as growth is told over."""

    def __init__(self, fetcher: Fetcher, over: float) -> None:
        self.fetcher, self.over = fetcher, over
        self.pool = ThreadPoolExecutor(THREADS)
        self.kept: dict[Target, deque[tuple[float, Scrape]]] = {}

    def look(self, targets: list[Target]) -> list[Reading]:
        """Ask all targets at once."""
        answers = list(self.pool.map(self.fetcher, targets))
        return [self._reading(target, answer) for target, answer in zip(targets, answers, strict=True)]

    def _reading(self, target: Target, answer: Scrape | str) -> Reading:
        if isinstance(answer, str):
            return Reading(target.name, reason=answer)
        now = time.monotonic()
        kept = self.kept.setdefault(target, deque())
        kept.append((now, answer))
        while len(kept) > 2 and now - kept[1][0] >= self.over:  # one from before the time stays
            kept.popleft()
        return Reading(target.name, answer, kept[0][1] if len(kept) > 1 else None)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.fetcher.close()


def _show_once(watch: Watch, targets: list[Target], over: float) -> None:
    readings = watch.look(targets)
    if all(reading.now is None for reading in readings):
        first = f"{readings[0].name}: {readings[0].reason}"
        others = f"; {len(readings) - 1} more" if len(readings) > 1 else ""
        raise ValueError(f"no node answers ({first}{others}); is the run alive, and metrics.address one for this host?")
    if over:
        time.sleep(over)
        readings = watch.look(targets)
    print("\n".join(lines(readings, shutil.get_terminal_size((PIPE_WIDTH, 0)).columns)))


def _show_live(watch: Watch, words: list[str], targets: list[Target], every: float) -> None:
    with _screen():
        while True:
            began = time.monotonic()
            readings = watch.look(targets)
            size = shutil.get_terminal_size()
            shown = lines(readings, size.columns, size.lines - 1)
            # Each line is cleared to its end, and the rest of the screen at last: nothing flickers.
            sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J")
            sys.stdout.flush()
            time.sleep(max(0.0, began + every - time.monotonic()))
            try:
                targets = find(words)  # a run that was restarted may have other ports
            except ValueError:
                continue


@contextmanager
def _screen() -> Iterator[None]:
    """A screen without cursor, which comes back at the end, also of a SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.write("\x1b[?25l\x1b[H\x1b[2J")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)
