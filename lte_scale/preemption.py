"""Stopping together: a signal on any rank ends all ranks after the same step, without a message per step.

Ranks that wait for one another in every step (a *lockstep* group: the node, or the world where the base is gathered
across nodes) agree by a tiny all-reduce. Between such groups nothing may cross the network while a window lasts, so
they use the job's key-value store: a group that has a signal sets `stop`; the others look for it twice a second;
each then announces the step it has reached and all continue to the furthest one. A group that waits for all others, in
a global merge or for a save, announces that too, since it cannot come that far: the others then run up to that step,
which they would block otherwise.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from lte_scale.collectives import Collectives, Group
from lte_scale.log import log

_LOOK_EVERY_SECONDS = 0.5
_REPEATED_SECONDS = 5.0
"""A signal that comes again so soon is the same one: from the terminal or scheduler, and from the launcher."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption:
    """Turns signals into a common last step.

    Attributes:
        received: number of the signal this process got, or 0.
        reason: why this process wants the run to end, if not for a signal.
        noticed: whether this group knows of a stop.
        meanwhile: called now and then while this group waits for others to agree.
    """

    def __init__(
        self,
        collectives: Collectives,
        lockstep: Group,
        *,
        tied_steps: int = 0,
        may_end_at: Callable[[int], int] = lambda step: step,
        timeout_seconds: float = 600.0,
    ) -> None:
        """
        Args:
            tied_steps: in so many steps all ranks wait for one another, so none may leave.
            may_end_at: the first step from a given one on after which a run may end.
        """
        self.collectives, self.lockstep, self.timeout_seconds = collectives, lockstep, timeout_seconds
        self.received = 0
        self.reason: str | None = None
        self.noticed = False
        self.meanwhile: Callable[[], None] = lambda: None
        self.last_step: int | None = None
        self.may_end_at = may_end_at
        topology = collectives.topology
        self.groups = topology.world_size // lockstep.size
        self.group = min(lockstep.ranks) // lockstep.size
        self.leads = topology.rank == min(lockstep.ranks)
        self._tied = tied_steps
        self._received_at = 0.0
        self._looked = 0.0
        self._store = dist.distributed_c10d._get_default_store() if self.groups > 1 else None
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > _REPEATED_SECONDS:  # asked again: do not wait for a clean end
            signal.signal(number, self._previous[signal.Signals(number)] or signal.SIG_DFL)
            signal.raise_signal(number)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def fail(self, reason: str) -> None:
        """Have all ranks stop after saving, this one with `reason` as its error."""
        self.reason = reason

    def meeting(self, step: int) -> None:
        """Announce that this group waits at `step` until all others are there, and look as soon as it is through."""
        self._looked = 0.0
        if self._store is not None and self.leads:
            self._store.set(f"lte/at/{self.group}", str(step))

    def waiting(self, step: int) -> None:
        """Called now and then while this group may be waiting for others at `step`, after `notice`.

        If another wants to stop it is told where this group will decide: here, or, where it has not noticed, a step on.
        """
        if self._store is not None and self.leads and self.last_step is None and self._store.check(["lte/stop"]):
            self.meeting(step if self.noticed else step + 1)

    def notice(self) -> None:
        """Let the group know whether one of its ranks is to stop, or has heard of one. Collective in it, every step."""
        if self._tied > 0:
            self._tied -= 1
        elif not self.noticed:
            heard = self.received or self.reason or (self.leads and self._look())
            self.noticed = bool(self._maximum(int(bool(heard))))

    def should_stop(self, step: int) -> bool:
        """Whether all ranks stop after `step`. Waits for other groups where a stop was noticed."""
        if self.noticed and self.last_step is None:
            self.last_step = self.may_end_at(self._maximum(self._negotiate(step) if self.leads else 0))
            log.info("stop requested: all ranks end after step %d", self.last_step)
        return self.last_step is not None and step >= self.last_step

    def _maximum(self, value: int) -> int:
        flag: Tensor = torch.tensor([value])
        return int(self.collectives.all_reduce(flag, self.lockstep, "control", maximum=True).item())

    def _look(self) -> bool:
        if self._store is None or time.monotonic() - self._looked < _LOOK_EVERY_SECONDS:
            return False
        self._looked = time.monotonic()
        return self._store.check(["lte/stop"])

    def _negotiate(self, step: int) -> int:
        """The furthest step any group has reached, or waits at."""
        if self._store is None:
            return step
        self._store.set("lte/stop", "1")
        self._store.set(f"lte/reached/{self.group}", str(step))
        deadline = time.monotonic() + self.timeout_seconds
        reached = {self.group: step}
        while len(reached) < self.groups and time.monotonic() < deadline:
            for group in set(range(self.groups)) - set(reached):
                waits_at = self._read(f"lte/at/{group}")
                if waits_at is not None and waits_at > step:
                    reached[group] = waits_at
                elif (announced := self._read(f"lte/reached/{group}")) is not None:
                    reached[group] = announced
            self.meanwhile()
            time.sleep(0.02)
        return max(reached.values())

    def _read(self, key: str) -> int | None:
        assert self._store is not None
        return int(self._store.get(key)) if self._store.check([key]) else None
