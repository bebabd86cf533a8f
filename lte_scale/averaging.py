"""Averaging gradients over ranks while the backward pass goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lte_scale.collectives import Collectives, Group

_PARTS, _LEAST, _MOST = 8, 1 << 20, 25 << 20
"""How many messages, and their bytes: the last one has nothing to hide under, and small ones are slow (DDP: 25 MB)."""


class GradientAverage:
    """The gradients of a head that several ranks share, or that all ranks train, as one flat buffer.

    Every gradient is a view of the buffer, and a part of the buffer is summed as soon as all that lies in it is there.
    Parts are summed in order, the same on all ranks and in every step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        collectives: Collectives,
        group: Group,
        *,
        passes: int = 1,
        part_bytes: int = 0,
    ) -> None:
        """
        Args:
            parameters: in fp32, on one device, about in the order in which a backward pass reaches them.
            passes: backward passes of a step.
            part_bytes: of a message; 0 for a good size.
        """
        self.collectives, self.group, self.passes = collectives, group, passes
        first = next(iter(parameters.values()))
        self.flat = first.new_zeros(sum(p.numel() for p in parameters.values()))
        # Parts that the group divides: what is sent for all of them is what one message would send.
        part_bytes = part_bytes or min(max(self.flat.nbytes // _PARTS, _LEAST), _MOST)
        length = -(-part_bytes // first.element_size() // group.size) * group.size
        self.parts = self.flat.split(length)
        self.expected = Counter[int]()
        offset = 0
        for name, parameter in parameters.items():
            end = offset + parameter.numel()
            parameter.grad = self.flat[offset:end].view_as(parameter)
            lies_in = range(offset // length, -(-end // length))
            self.expected.update(dict.fromkeys(lies_in, passes))
            parameter.register_post_accumulate_grad_hook(self._hook(name, lies_in))
            offset = end
        self.left = dict.fromkeys(parameters, passes)
        self.waits: list[Callable[[], None]] = []
        self.missing = self.expected.copy()

    def without_gradient(self) -> list[str]:
        """Names of parameters that no backward pass of this step has reached."""
        return [name for name, left in self.left.items() if left == self.passes]

    def finish(self) -> None:
        """After the backward passes of a step: gradients are the means over the group. Collective."""
        self._begin(len(self.parts))
        for wait in self.waits:
            wait()
        self.flat.div_(self.group.size)

    def clear(self) -> None:
        """Begin a step."""
        self.flat.zero_()
        self.waits.clear()
        self.missing = self.expected.copy()
        self.left = dict.fromkeys(self.left, self.passes)

    def _hook(self, name: str, lies_in: range) -> Callable[[Tensor], None]:
        def accumulated(parameter: Tensor) -> None:
            self.left[name] -= 1
            if self.left[name] < 0:  # it would add to what has been summed
                raise RuntimeError(f"more backward passes before a step than train.accumulate, {self.passes}")
            self.missing.subtract(lies_in)
            ready = len(self.waits)
            while ready < len(self.parts) and not self.missing[ready]:
                ready += 1
            self._begin(ready)

        return accumulated

    @torch.no_grad()
    def _begin(self, parts: int) -> None:
        """Have as many parts under way."""
        for part in self.parts[len(self.waits) : parts]:
            self.waits.append(self.collectives.begin_all_reduce(part, self.group, "head_gradient"))
