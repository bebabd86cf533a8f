"""LTE in a loop of your own: four heads in one process learn scikit-learn's handwritten digits.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from lte_scale.assemble import adapt
from lte_scale.config import load_config

STEPS, BATCH = 200, 32

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
train = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1500]
held_out = torch.ones(len(labels), dtype=torch.bool).index_fill(0, train, False)

config = load_config(
    None,
    [
        "engine=none",
        "topology.heads_per_node=4",
        "merge.every=5",
        "adapters.rank=16",
        "adapters.alpha=64",
        "model.image_size=8",
        "model.channels=1",
        "optimizer.lr=2e-3",
        "optimizer.replica_lr=5e-3",
        "model.arguments={patch_size: 2, embed_dim: 64, depth: 4, num_heads: 4}",
    ],
)
lte = adapt(config, num_classes=10)
for step in range(1, STEPS + 1):
    batch = train[torch.randint(len(train), (4 * BATCH,))]  # head-major: the first quarter is the first head's
    with lte.autocast:
        logits = lte.model(images[batch]).float()
    losses = F.cross_entropy(logits, labels[batch], reduction="none").view(4, BATCH).mean(1)
    losses.sum().backward()
    decay = 1 - step / (STEPS + 1)
    lte.optimizer.step(losses.detach(), rate=decay.__mul__)
    if lte.merger.due(step):
        lte.merger.merge(step)
with torch.no_grad(), lte.merged() as model:
    accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
print(f"held-out top-1 of the merged model: {accuracy:.1%}")
