"""After which steps heads are merged, which part of the model, and when the result is there: a function of the step.

every 12, 3 fragments, delay 2        step  4 5 6 7 8 9 10 11 12 13 14 15 16 ...
fragment 1 departs, lands                   1   1
fragment 2                                          2      2
fragment 0, with the replica parameters                        0     0
fragment 1 again                                                           1

every 12, regions every 6, local 3    step  3 6 9 12 15 18 21 24 ...
inside the node, region, all                n r n a  n  r  n  a

every 6, growth 0.5                   step  1 2 3 4 5 6 7 8 9 10 11 12 13 ... 19 ... 25 ...
all fragments                               0 0 0 0   0     0          0      0      0
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Cadence:
    """Periods in optimizer steps.

    A fragment's global merge *departs* when its change is sent, and *lands* `delay` steps later when it is applied. No
    two are under way at the same time, and no heads are merged meanwhile.

    With `growth` a window is no longer than this share of the steps before it. As long as that is less than `every`,
    all fragments depart at its end, and land at once.
    """

    every: int
    local_every: int
    fragments: int = 1
    delay: int = 0
    growth: float = 0.0
    region_every: int = 0

    @property
    def two_level(self) -> bool:
        """Whether heads are merged inside the nodes more often than between them."""
        return self.local_every < self.every

    @property
    def levels(self) -> str:
        """The periods of merges that are not of all nodes, in words; empty if there are none."""
        region = f", in the region {self.region_every}" if self.region_every else ""
        return f"in the node {self.local_every}{region}" if self.two_level else ""

    @property
    def longest_delay(self) -> int:
        """The largest `delay` there is room for before heads are merged again."""
        return min(self.local_every, self.apart) - 1

    @property
    def apart(self) -> int:
        """Steps between the departures of two fragments."""
        return self.every // self.fragments

    @cached_property
    def _early(self) -> list[int]:
        """0, and the ends of the windows that are shorter than `every`."""
        ends = [0]
        while self.growth and (length := max(1, int(self.growth * ends[-1]))) < self.every:
            whole = length - length % self.local_every
            ends.append(ends[-1] + (whole or length))
        return ends

    @property
    def grown(self) -> int:
        """The step after which windows have their full length."""
        return self._early[-1]

    def _begun(self, step: int) -> int:
        """The end of the window before that of `step`, for a step no later than `grown`."""
        return self._early[max(0, bisect_left(self._early, step) - 1)]

    def window_end(self, step: int) -> int:
        """The last step of the window of `step`."""
        if step <= self.grown:
            return self._early[bisect_left(self._early, step)]
        return step + (self.grown - step) % self.every

    def covered(self, step: int) -> range:
        """The steps that are behind a fragment's merge which lands after `step`."""
        first = self._begun(step) if step <= self.grown else max(self.grown, step - self.every)
        return range(first + 1, step + 1)

    def departs(self, step: int) -> int | None:
        """The fragment that departs after `step`; 0, with the replica parameters, at the end of every window."""
        if 0 < step <= self.grown:
            return 0 if step in self._early else None
        step -= self.grown
        return step // self.apart % self.fragments if step > 0 and step % self.apart == 0 else None

    def takes_time(self, step: int) -> bool:
        """Whether what departs after `step` lands later."""
        return self.delay > 0 and step > self.grown

    def lands(self, step: int) -> int | None:
        """The fragment that lands after `step`."""
        if step <= self.grown:
            return self.departs(step)
        departed = step - self.delay
        return self.departs(departed) if departed > self.grown else None

    def is_local(self, step: int) -> bool:
        """Whether what does not depart after `step` is merged inside the nodes."""
        return self.two_level and self._behind(step) % self.local_every == 0

    def is_regional(self, step: int) -> bool:
        """Whether what does not depart after `step`, and is merged inside the nodes, is merged inside regions too."""
        return self.region_every > 0 and self._behind(step) % self.region_every == 0

    def _behind(self, step: int) -> int:
        """Steps up to `step` since its early window began; after the early ones, since the last of them."""
        return step - (self._begun(step) if step <= self.grown else self.grown)

    def due(self, step: int) -> bool:
        """Whether there is anything to merge after `step`."""
        return self.is_local(step) or self.departs(step) is not None or self.lands(step) is not None

    def under_way(self, step: int) -> bool:
        """Whether a global merge has departed by the end of `step`, and not landed."""
        step -= self.grown
        return step >= self.apart and step % self.apart < self.delay

    def at_rest(self, step: int) -> int:
        """The first step from `step` on after which nothing is under way: a run may end there, and be saved."""
        return step - (step - self.grown) % self.apart + self.delay if self.under_way(step) else step

    def sets_sent(self, step: int, *, last: bool = False) -> dict[int, int]:
        """Merges of the heads since the last global one, this one included, of every fragment that departs at `step`.

        `last`: the run ends here, and all fragments are merged.
        """
        departing = self.departs(step)
        whole = last or (departing is not None and step <= self.grown)
        fragments = range(self.fragments) if whole else () if departing is None else (departing,)
        return {fragment: self._since(fragment, step) // self.local_every or 1 for fragment in fragments}

    def _since(self, fragment: int, step: int) -> int:
        """Steps since the last departure of `fragment` before `step`."""
        if step <= self.grown:
            return step - self._begun(step)
        step -= self.grown
        first = fragment * self.apart or self.every
        return (step - first - 1) % self.every + 1 if step > first else step
