"""The mean over nodes of what each has learned, in fewer bits than it has, with nothing lost from window to window."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_scale.codec import Codec
from lte_scale.collectives import Collectives, Group


class MeanWithFeedback:
    """A reduction over a group in two halves: each sends every other one its part, each sends all the mean of a part.

    Both halves send what a codec makes of the values, and keep what that misses to add it to the next window's values.
    Over any number of windows, with x_kw what node k brings and y_w what all take,

        K * sum_w y_w = sum_kw x_kw - sum_k unsent_k - K * unshared           (to fp32 rounding)

    All take what the messages decode to, owners as well: so all hold the same bits.

    Attributes:
        unsent: what this rank has not sent yet, a row for each peer [K, c].
        unshared: what it has not told of the mean of its own part [c]; empty if the mean stays with the owner.
    """

    def __init__(
        self,
        codec: Codec,
        collectives: Collectives,
        group: Group,
        purpose: str,
        size: int,
        *,
        shared: bool,
        device: torch.device,
    ) -> None:
        self.codec, self.collectives, self.group, self.purpose, self.shared = codec, collectives, group, purpose, shared
        self.unsent = torch.zeros(group.size, size, device=device)
        self.unshared = torch.zeros(size if shared else 0, device=device)

    def mean(self, rows_KC: Tensor) -> Tensor:
        """The mean over the peers of all rows [K, c], or of this rank's own [c] if it is not shared."""
        nodes, size = rows_KC.shape
        message = self._send(rows_KC, self.unsent)
        received = self.collectives.all_to_all(message, self.group, self.purpose)
        own = self.codec.decode(received, size).sum(0) / nodes
        if not self.shared:
            return own
        message = self._send(own, self.unshared)
        return self.codec.decode(self.collectives.all_gather(message, self.group, self.purpose), size)

    def forget(self) -> None:
        """Where what was missed has arrived by another way."""
        self.unsent.zero_()
        self.unshared.zero_()

    def _send(self, values: Tensor, missing: Tensor) -> Tensor:
        """The message for `values` and what was `missing` from earlier ones, which becomes what is missing now."""
        missing.add_(values)
        message = self.codec.encode(missing)
        missing.sub_(self.codec.decode(message, values.shape[-1]))
        return message
