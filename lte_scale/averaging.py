"""Averaging gradients over ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lte_scale.collectives import Collectives, Group

_PARTS, _LEAST, _MOST = 8, 1 << 20, 25 << 20
"""How many messages, and their bytes: the last one has nothing to hide under, and small ones are slow (DDP: 25 MB)."""


class GradientAverage:
    """The gradients of a head that several ranks share, or that all ranks train, as one flat buffer.

    Every gradient is a view of the buffer, and a part of the buffer is summed as soon as all that lies in it is there:
    at first in the order of the parameters, from the second step on in that of the backward pass. Parts are summed in
    order, the same on all ranks.

    Attributes:
        seen: names of parameters that have had a gradient, in the order of the first backward pass.
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
            parameters: in fp32, on one device.
            passes: backward passes of a step.
            part_bytes: of a message; 0 for a good size.
        """
        self.parameters, self.collectives, self.group, self.passes = dict(parameters), collectives, group, passes
        first = next(iter(self.parameters.values()))
        self.flat = first.new_zeros(sum(p.numel() for p in self.parameters.values()))
        # Parts that the group divides: what is sent for all of them is what one message would send.
        part_bytes = part_bytes or min(max(self.flat.nbytes // _PARTS, _LEAST), _MOST)
        self.length = -(-part_bytes // first.element_size() // group.size) * group.size
        self.parts = self.flat.split(self.length)
        self.seen: dict[str, None] = {}
        self.learning = True
        self.waits: list[Callable[[], None]] = []
        self._lay_out(list(self.parameters))
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def finish(self) -> None:
        """After the backward passes of a step: gradients are the means over the group. Collective."""
        self._begin(len(self.parts))
        for wait in self.waits:
            wait()
        self.flat.div_(self.group.size)

    def clear(self) -> None:
        """Begin a step."""
        self.flat.zero_()
        if self.learning:
            self.learning = False
            order = self.collectives.broadcast_object([*self.seen, *(self.parameters.keys() - self.seen.keys())])
            self._lay_out(order)
        self.waits.clear()
        self.missing = list(self.expected)

    def _lay_out(self, order: list[str]) -> None:
        """Give every parameter its place, in this order; nothing has been accumulated."""
        self.lies_in: dict[str, range] = {}
        self.expected = [0] * len(self.parts)
        offset = 0
        for name in order:
            parameter = self.parameters[name]
            end = offset + parameter.numel()
            parameter.grad = self.flat[offset:end].view_as(parameter)
            self.lies_in[name] = range(offset // self.length, -(-end // self.length))
            for part in self.lies_in[name]:
                self.expected[part] += self.passes
            offset = end
        self.missing = list(self.expected)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def accumulated(parameter: Tensor) -> None:
            if self.learning:
                self.seen[name] = None
            for part in self.lies_in[name]:
                self.missing[part] -= 1
                if self.missing[part] < 0:
                    raise RuntimeError(
                        f"more backward passes before optimizer.step() than train.accumulate {self.passes}"
                    )
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
