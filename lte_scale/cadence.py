"""After which steps heads are merged, which part of the model, and when the result is there: a function of the step.

every 12, 3 fragments, delay 2        step  4 5 6 7 8 9 10 11 12 13 14 15 16 ...
fragment 1 departs, lands                   1   1
fragment 2                                          2      2
fragment 0, with the replica parameters                        0     0
fragment 1 again                                                           1
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cadence:
    """Periods in optimizer steps.

    A fragment's global merge *departs* when its change is sent, and *lands* `delay` steps later when it is applied. No
    two are under way at the same time, and no heads are merged meanwhile.
    """

    every: int
    local_every: int
    fragments: int = 1
    delay: int = 0

    @property
    def two_level(self) -> bool:
        """Whether heads are merged inside the nodes more often than between them."""
        return self.local_every < self.every

    @property
    def longest_delay(self) -> int:
        """The largest `delay` there is room for before heads are merged again."""
        return min(self.local_every, self.apart) - 1

    @property
    def apart(self) -> int:
        """Steps between the departures of two fragments."""
        return self.every // self.fragments

    def departs(self, step: int) -> int | None:
        """The fragment that departs after `step`; 0, with the replica parameters, at the end of every window."""
        return step // self.apart % self.fragments if step > 0 and step % self.apart == 0 else None

    def lands(self, step: int) -> int | None:
        """The fragment that lands after `step`."""
        return self.departs(step - self.delay)

    def is_local(self, step: int) -> bool:
        """Whether what does not depart after `step` is merged inside the nodes."""
        return self.two_level and step % self.local_every == 0

    def due(self, step: int) -> bool:
        """Whether there is anything to merge after `step`."""
        return self.is_local(step) or self.departs(step) is not None or self.lands(step) is not None

    def under_way(self, step: int) -> bool:
        """Whether a global merge has departed by the end of `step`, and not landed."""
        return step >= self.apart and step % self.apart < self.delay

    def at_rest(self, step: int) -> int:
        """The first step from `step` on after which nothing is under way: a run may end there, and be saved."""
        return step - step % self.apart + self.delay if self.under_way(step) else step

    def sets_sent(self, step: int, *, last: bool = False) -> dict[int, int]:
        """Merges of the heads since the last global one, this one included, of every fragment that departs at `step`.

        `last`: the run ends here, and all fragments are merged.
        """
        departing = self.departs(step)
        fragments = range(self.fragments) if last else () if departing is None else (departing,)
        return {fragment: self._since(fragment, step) // self.local_every or 1 for fragment in fragments}

    def _since(self, fragment: int, step: int) -> int:
        """Steps since the last departure of `fragment` before `step`."""
        first = fragment * self.apart or self.every
        return (step - first - 1) % self.every + 1 if step > first else step
