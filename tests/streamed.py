"""A model opened and walked block by block, as all stages do."""

import torch

from cluscomp.models.original import Original
from cluscomp.models.walk import Walk


def opened(folder, dtype=torch.float32) -> Original:
    return Original(folder, dtype, torch.device("cpu"))


@torch.no_grad()
def streamed_logits(original: Original, ids: torch.Tensor) -> torch.Tensor:
    """Logits with one block of the model in memory at a time."""
    walk = Walk(original.model(), original)
    hidden = walk.embed(ids)
    for index in range(len(walk)):
        with walk.block(index) as block:
            hidden = walk.apply(index, block, hidden)
    return walk.logits(hidden, ids)
