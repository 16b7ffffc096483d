"""The one fit loop all training stages share."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter


def fit(
    parameters: list[Parameter],
    loss_of: Callable[[int], Tensor],
    num_batches: int,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    schedule: str,
) -> bool:
    """Minimise `loss_of(batch number)` over the float32 `parameters` with AdamW, batches always in the same order.

    schedule: "constant", or "cosine" from lr down to 0. No clipping, torch's betas (the paper code's choices). Stops at
    the first loss that is not finite and returns False, with the parameters as they then are; otherwise True.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = epochs * num_batches
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule == "cosine" else None
    for step in range(steps):
        loss = loss_of(step % num_batches)
        if not bool(loss.isfinite()):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if decay is not None:
            decay.step()
    return True
