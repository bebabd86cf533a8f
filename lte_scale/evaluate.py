"""Accuracy of a model, the ranks sharing the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_scale.collectives import Collectives
from lte_scale.config.schema import Config
from lte_scale.evaluation_data import evaluation_batches
from lte_scale.index import ShardIndex, open_index
from lte_scale.log import log


def score(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Correct within 1, correct within 5, summed loss, count [4], over the valid samples.

    Args:
        logits: [B, classes]; with fewer than 5 classes "within 5" means within all of them.
        labels: [B]; those of invalid samples are not read.
        valid: [B] booleans.
    """
    labels = labels.where(valid, 0)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels.unsqueeze(1)) & valid.unsqueeze(1)
    loss = F.cross_entropy(logits.float(), labels, reduction="none").where(valid, 0.0).sum()
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, valid.sum()]).double()


def results(sums: Tensor) -> dict[str, float]:
    """`eval_top1` and `eval_top5` (ratios) and `eval_loss` (mean) from the sums of `score`."""
    within_1, within_5, loss, count = sums.tolist()
    count = max(count, 1.0)
    return {"eval_top1": within_1 / count, "eval_top5": within_5 / count, "eval_loss": loss / count}


class Evaluator:
    """Evaluates on the run's validation shards; every rank takes its part and runs as many passes as any other."""

    def __init__(
        self,
        config: Config,
        classes: int,
        collectives: Collectives,
        device: torch.device,
        autocast: AbstractContextManager[object],
    ) -> None:
        self.config, self.classes, self.collectives = config, classes, collectives
        self.device, self.autocast = device, autocast
        self.index: ShardIndex | None = None
        if config.data.val:
            self.index = open_index(config.data.val, allow_pipe=config.data.allow_pipe)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Collective. The model is in evaluation mode meanwhile. `progress` is called after every batch."""
        assert self.index is not None
        topology, config = self.collectives.topology, self.config
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        model.eval()
        for batch in evaluation_batches(
            self.index,
            rank=topology.rank,
            world=topology.world_size,
            batch_size=config.evaluate.batch_size,
            image_size=config.model.image_size,
            channels=config.model.channels,
            augment=config.augment,
            data=config.data,
            num_classes=self.classes,
        ):
            for name in batch.bad:
                log.warning("evaluation: left out damaged %s", name)
            images, labels, valid = (
                t.to(self.device, non_blocking=True) for t in (batch.images, batch.labels, batch.valid)
            )
            with self.autocast:
                logits = model(images)
            sums += score(logits, labels, valid)
            progress()
        model.train()
        return results(self.collectives.all_reduce(sums, self.collectives.world, "evaluate"))
