"""The watchdog of a rank: two threads, one that measures the silence and one that talks to the other ranks.

Nothing is exchanged while all goes well, but a look at one key of the job's store every few seconds. A rank that has
been silent for nearly as long as it may opens a *round*: every rank answers with a report, also those that train on
elsewhere, so that one that does not answer is known to be stopped or gone. When the silence is as long as it may be,
the first rank to see a cause (`verdict`) writes it down in the store and in events.log; on that all ranks dump their
stacks to `RUN/hangs` and end at once, since their main threads are where no exception reaches them. Where those waited
for are at work, as on a slower node, nothing ends.

The two are separate since the store may be what does not answer, its node being lost: a silent rank then ends alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

from lte_scale.collectives import Call, Collectives
from lte_scale.log import log
from lte_scale.watchdog.stacks import flight_recorder, in_torch, stacks, where
from lte_scale.watchdog.verdict import Report, Verdict, judge, sentence

EXIT_CODE = 75
"""Of a rank that the watchdog ended: EX_TEMPFAIL, worth another try."""

_FIRST_PATIENCE = 4.0
_LAST_WORDS_SECONDS = 10.0
_ROUND, _VERDICT, _DUMPED = "lte/hang/round", "lte/hang/verdict", "lte/hang/dumped"
_NONE = "none"


class Watchdog:
    """Ends this process with `EXIT_CODE` when `beat` was not called for `seconds` and no rank waited for is at work."""

    def __init__(self, collectives: Collectives, run_dir: Path, seconds: float) -> None:
        """Starts watching, with more time for the first step. `seconds`: 0 is off."""
        self.collectives, self.topology = collectives, collectives.topology
        self.run_dir, self.seconds = run_dir, seconds
        self.tick = min(1.0, seconds / 10)
        self.grace = min(15.0, seconds / 2)
        """How long before the end of its time a silent rank asks the others."""
        self._host = socket.gethostname()
        self._last: tuple[int, str, float] = (0, "before the first step", _FIRST_PATIENCE)
        self._counted = (self._last, 0.0)
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._round, self._opened, self._heard = 0, -math.inf, time.monotonic()
        self._warned: object = None
        self._threads: list[threading.Thread] = []
        if seconds > 0:
            targets = [self._watch]
            if self.topology.world_size > 1:
                self._store = self._connect()
                targets.append(self._talk)
            self._threads = [threading.Thread(target=t, name=f"watchdog{t.__name__}", daemon=True) for t in targets]
            for thread in self._threads:
                thread.start()

    def beat(self, step: int, doing: str = "", *, patience: float = 1.0) -> None:
        """Say that there is progress: `step` is done and what comes next may take `patience` times as long as usual."""
        self._last = (step, doing, patience)  # a new tuple: the thread compares by identity, so that this costs nothing

    def close(self) -> None:
        """Stop watching. Does not return where this process is being ended, whose cause an error here would hide."""
        while self._ending.locked():  # another rank ended a moment earlier: the collective failed that this one was in
            time.sleep(0.1)
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.tick)

    # ------------------------------------------------------------------------------------------------ silence

    @property
    def _silence(self) -> float:
        """Seconds since the last beat; none is counted yet of one that came since the last tick."""
        last, silence = self._counted
        return silence if last is self._last else 0.0

    @property
    def _allowed(self) -> float:
        return self.seconds * self._last[2]

    @property
    def _remaining(self) -> float:
        """Seconds that the silence may still last; negative: it has lasted longer than it may."""
        last, silence = self._counted  # one beat's patience and its own silence, whenever the next one comes
        return self.seconds * last[2] - (silence if last is self._last else 0.0)

    @property
    def _suspicious(self) -> bool:
        return self._remaining < self.grace

    def _watch(self) -> None:
        """Count silence in ticks, not by the clock: time in which the whole job was suspended is none."""
        before = time.monotonic()
        while not self._closed.wait(self.tick):
            now = time.monotonic()
            last, silence = self._counted
            going_on = last is self._last
            self._counted = (last, silence + min(now - before, 2 * self.tick)) if going_on else (self._last, 0.0)
            if now - before > self.grace / 2:  # suspended: what others have answered, or have not, is of before
                self._heard, self._opened = self._heard + now - before, -math.inf
            before = now
            if self._remaining > 0:
                continue
            if self.topology.world_size == 1:
                reports = {0: self._report()}
                self._end(self._line(sentence(judge(reports, 1), reports, self.topology, {0: self._host})))
            elif now - self._heard > self.grace + 5 * self.tick:
                self._end(
                    self._line(f"the job's store does not answer, as when the node of rank 0 is lost; {self._self()}")
                )

    def _report(self) -> Report:
        step, doing, _ = self._last
        collectives = self.collectives
        return Report(
            rank=self.topology.rank,
            host=self._host,
            step=step,
            doing=doing,
            silent=self._remaining < min(self.grace, self._allowed / 10),
            where=where(),
            in_torch=in_torch(),
            asynchronous=torch.cuda.is_initialized(),
            call=collectives.last,
            inside=collectives.inside,
            entered=dict(collectives.entered),
        )

    # ------------------------------------------------------------------------------------------------ the others

    def _connect(self) -> Any:
        """A client of its own: the main thread may be blocked in the one it uses."""
        store = _get_default_store().clone()
        store.set_timeout(timedelta(seconds=max(1.0, self.grace)))
        store.compare_set(_ROUND, "", "0")
        store.compare_set(_VERDICT, "", _NONE)
        store.set(self._key(self.topology.rank), _encode(self._report(), 0))
        return store

    def _key(self, rank: int) -> str:
        return f"lte/hang/{rank}"

    def _talk(self) -> None:
        rest = min(5.0, self.seconds / 10)
        while not self._closed.wait(self.tick if self._is_open or self._suspicious else rest):
            try:
                self._exchange()
                self._heard = time.monotonic()
            except Exception:  # the store's answer may still come and must not be taken for that to another question
                with contextlib.suppress(Exception):
                    self._store = self._connect()

    @property
    def _is_open(self) -> bool:
        return time.monotonic() - self._opened < 2 * self.grace

    def _exchange(self) -> None:
        """One turn of the conversation: take part in a round, open one, conclude."""
        number, verdict = self._store.multi_get([_ROUND, _VERDICT])
        if verdict.decode() != _NONE:
            self._end_together(json.loads(verdict), log_it=False)
        if int(number) != self._round:
            self._round, self._opened = int(number), time.monotonic()
        if self._is_open:
            self._store.set(self._key(self.topology.rank), _encode(self._report(), self._round))
        elif self._suspicious:
            self._store.compare_set(_ROUND, str(self._round), str(self._round + 1))
            return
        if self._remaining <= 0 and time.monotonic() - self._opened >= 0.9 * self.grace:
            self._conclude()

    def _conclude(self) -> None:
        ranks = range(self.topology.world_size)
        keys = [self._key(rank) for rank in ranks]
        known = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        found = [_decode(text) for text in self._store.multi_get(known)]
        reports = {report.rank: report for report, number in found if number == self._round}
        if not reports.get(self.topology.rank, Report(rank=0, silent=False)).silent:
            return
        hosts = {report.rank: report.host for report, _ in found}
        verdict = judge(reports, self.topology.world_size)
        said = sentence(verdict, reports, self.topology, hosts)
        if verdict.kind != "slow":
            mine = {
                "rank": self.topology.rank,
                "answered": len(reports),
                "said": self._line(said, _step(verdict, reports)),
            }
            winner = self._store.compare_set(_VERDICT, _NONE, json.dumps(mine))
            self._end_together(json.loads(winner), log_it=json.loads(winner) == mine)
        elif self._warned is not self._last and self._remaining < -self.grace:
            self._warned = self._last
            log.warning("no progress for %.0f s after step %d: %s", self._silence, self._last[0], said)

    # ------------------------------------------------------------------------------------------------ the end

    def _line(self, said: str, step: int | None = None) -> str:
        """One line for events.log. `step`: the last one of the ranks named."""
        step = self._last[0] if step is None else step
        after = f"after step {step}" if step else "in the first step"
        ends = f"stacks in {self.run_dir / 'hangs'}; ending the run for a restart"
        return f"hang: no progress for {self._silence:.0f} s {after}; {said}; {ends}"

    def _self(self) -> str:
        report = self._report()
        at = f"in the {report.call.purpose} collective, " if report.call and report.inside else ""
        return f"this rank (node {self.topology.node}, host {self._host}) is {at}in {report.where}"

    def _end_together(self, verdict: Mapping[str, Any], *, log_it: bool) -> None:
        """End, all in the same moment: the launcher kills the others of a node when one has ended."""
        until = time.monotonic() + 3 + 3 * self.tick

        def others() -> None:
            self._store.add(_DUMPED, 1)
            while self._store.add(_DUMPED, 0) < verdict["answered"] and time.monotonic() < until:
                time.sleep(0.05)

        self._end(verdict["said"], log_it=log_it, before=others)

    def _end(self, said: str, *, log_it: bool = True, before: Any = None) -> None:
        """Say it, dump the stacks, exit: in any case, also where the disk is what hangs."""
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        last = threading.Timer(_LAST_WORDS_SECONDS, os._exit, [EXIT_CODE])
        last.daemon, last.name = True, "watchdog_end"
        last.start()
        try:
            if log_it:
                log.error("%s", said)
            with contextlib.suppress(OSError):
                self._dump(said)
            if before is not None:
                before()
        finally:
            os._exit(EXIT_CODE)

    def _dump(self, said: str) -> None:
        report, folder = self._report(), self.run_dir / "hangs"
        folder.mkdir(parents=True, exist_ok=True)
        counts = {" ".join(map(str, ranks)): number for ranks, number in report.entered.items()}
        state = "is inside" if report.inside else "has left"
        call = (
            report.call and f"{report.call.purpose}, number {report.call.number} of ranks {report.call.ranks}; {state}"
        )
        path = folder / f"step_{report.step:08d}_rank{report.rank}.txt"
        with path.open("w") as file:
            file.write(
                f"{said}\n\n"
                f"time               {datetime.now().astimezone().isoformat(timespec='seconds')}\n"
                f"rank               {report.rank} (node {self.topology.node}, host {report.host}, pid {os.getpid()})\n"
                f"step               {report.step} done{f', then {report.doing}' if report.doing else ''}\n"
                f"silent for         {self._silence:.1f} of {self._allowed:.0f} s\n"
                f"last collective    {call}\n"
                f"collectives        {counts} (by the ranks of the group)\n\n{stacks()}"
            )
            file.flush()
            recorded = flight_recorder()
            file.write(f"\nflight recorder, collectives that are not done:\n{recorded}\n" if recorded else "")


def _step(verdict: Verdict, reports: Mapping[int, Report]) -> int | None:
    return min((reports[rank].step for rank in verdict.ranks if rank in reports), default=None)


def _encode(report: Report, number: int) -> str:
    fields = asdict(report) | {"entered": [[list(ranks), n] for ranks, n in report.entered.items()]}
    return json.dumps([number, fields])


def _decode(text: bytes) -> tuple[Report, int]:
    number, fields = json.loads(text)
    fields["entered"] = {tuple(ranks): n for ranks, n in fields["entered"]}
    if fields["call"]:
        fields["call"] = Call(fields["call"]["purpose"], tuple(fields["call"]["ranks"]), fields["call"]["number"])
    return Report(**fields), number
