"""The products that a merge adds to the base: (s / h) sum B A over a node's heads, or (s / N) over all.

Resetless heads keep their factors, so what they add is a product less that of the merge before, which is kept here.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from lte_scale.arrangement import Arrangement, Bucket, Ownership, length
from lte_scale.collectives import Collectives
from lte_scale.dense import joined
from lte_scale.exchange import FactorExchange, Factors, product
from lte_scale.model import Heads


class Products:
    """Forms products from factors, each rank the parts it forms or owns.

    Attributes:
        node: of the node's heads at the last merge, on the parts this rank forms (resetless).
        mean: of all heads at the last global merge, on the part this rank owns (resetless, factor path).
    """

    def __init__(
        self,
        heads: Heads,
        arrangement: Arrangement,
        ownership: Mapping[str, Ownership],
        masters: Mapping[str, Tensor],
    ) -> None:
        """`masters`: the products are kept where these are."""
        self.heads, self.arrangement, self.ownership, self.masters = heads, arrangement, ownership, masters
        self.node: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self._clear()

    def of_node(self, bucket: Bucket, factors: Factors) -> dict[str, Tensor]:
        """What `factors` of the node's heads [h, values] change of each weight, on the parts this rank forms."""
        return self._changes(bucket, factors, self.node, whole=True)

    def of_all(self, bucket: Bucket, factors: Factors) -> dict[str, Tensor]:
        """What `factors` of all heads [K, L, h, values] change of each weight, on the part this rank owns."""
        return self._changes(bucket, factors, self.mean, whole=False)

    def by_weight(self, bucket: Bucket, factors: Factors) -> dict[str, Factors]:
        """The factors of each weight."""
        of_weights = [self.arrangement.shapes.layers[name].factor_sizes for name in bucket.names]
        sizes_A, sizes_B = zip(*of_weights, strict=True)
        split = zip(bucket.names, factors.A.split(sizes_A, -1), factors.B.split(sizes_B, -1), strict=True)
        return {name: Factors(A, B) for name, A, B in split}

    def keeps_node(self, bucket: Bucket) -> bool:
        """Whether the product of the node's heads is of use at the next merge."""
        a = self.arrangement
        return a.resetless and (a.folded or a.roaming or bucket.path == "dense")

    def restore(self, collectives: Collectives, buckets: list[Bucket]) -> None:
        """Form the products of the last merge anew from the previous factors (after loading them)."""
        if not self.arrangement.resetless:
            return
        self._clear()
        exchange = FactorExchange(self.heads, collectives)  # in fp32: of other bits than now, if precision changed
        for bucket in buckets:
            packed = exchange.pack(bucket.names, previous=True)
            if self.keeps_node(bucket):
                self.of_node(bucket, exchange.within_node(packed, bucket.names))
            if bucket.path == "factor":
                self.of_all(bucket, exchange.between_nodes(packed.unsqueeze(0), bucket.names))

    def _changes(
        self, bucket: Bucket, factors: Factors, previous: MutableMapping[str, Tensor], *, whole: bool
    ) -> dict[str, Tensor]:
        """The mean over `factors` of each weight's product, less `previous`, which it replaces."""
        changes: dict[str, Tensor] = {}
        topology, resetless = self.arrangement.topology, self.arrangement.resetless
        heads = topology.heads_per_node if whole else topology.heads
        for name, of_weight in self.by_weight(bucket, factors).items():
            own, layer = self.ownership[name], self.heads.linears[name]
            parts = own.parts if whole else (own.own,)
            formed = joined(product(of_weight, own.shape, layer.A.shape[1], parts, layer.scale / heads))
            changes[name] = formed - previous[name].to(formed.device) if resetless else formed
            if resetless:
                previous[name].copy_(formed)
        return changes

    def _clear(self) -> None:
        for bucket in self.arrangement.buckets if self.arrangement.resetless else ():
            for name in bucket.names:
                own, like = self.ownership[name], self.masters[name]
                if self.keeps_node(bucket):
                    self.node[name] = like.new_zeros(sum(map(length, own.parts)))
                if bucket.path == "factor":
                    self.mean[name] = like.new_zeros(length(own.own))
