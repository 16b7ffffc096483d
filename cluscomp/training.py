"""The one fit loop of training block by block, and the float32 masters it works on."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cluscomp.models import compressed
from cluscomp.weights import Weight

Batch = TypeVar("Batch")
Schedule = Literal["constant", "cosine"]


class Masters:
    """A block whose stored weights, and with `norms` its other parameters, train as float32 copies.

    Called, it runs the block on the copies while there are some (between `start` and `finish`), else as it is stored.
    """

    def __init__(self, block: nn.Module, *, norms: bool) -> None:
        layers = compressed(block)
        inside = tuple(f"{name}." for name in layers)
        others = {name: vector for name, vector in block.named_parameters() if not name.startswith(inside)}
        self.block = block
        self.weights = [cast(Weight, layer.stored) for layer in layers.values()]
        self.norms = others if norms else {}
        self._stored = [weight.state_dict() for weight in self.weights]
        self._vectors = [norm.data for norm in self.norms.values()]
        self._copies: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output; copies of norms are cast to the dtype the block computes in."""
        if not self._copies:
            return self.block(*args, **kwargs)
        cast_ = {name: copy.to(self.norms[name].dtype) for name, copy in self._copies.items()}
        return functional_call(self.block, cast_, args, kwargs)

    def start(self) -> list[Tensor]:
        """Make the copies of what is stored, and return them: what an optimiser works on."""
        for weight in self.weights:
            weight.loosen()
        self._copies = {
            name: norm.detach().to(torch.float32, copy=True).requires_grad_(True) for name, norm in self.norms.items()
        }
        return [*(parameter for weight in self.weights for parameter in weight.parameters()), *self._copies.values()]

    def finish(self) -> None:
        """Put the copies into the block, rounded as they will be stored: what is measured next is what is stored.

        A norm takes the block's dtype or, in a block that computes in 32 bits, 16-bit floats. Raises ValueError for
        copies that are not finite or do not fit.
        """
        for weight in self.weights:
            weight.settle()
        for name, copy in self._copies.items():
            norm = self.norms[name]
            narrow = norm.dtype if norm.dtype.itemsize == 2 else torch.float16
            norm.data = copy.detach().to(narrow).to(norm.dtype)
        self._copies = {}

    def restore(self) -> None:
        """Put back what the block had at first, exactly."""
        self._copies = {}
        for weight, state in zip(self.weights, self._stored):
            weight.restore(state)
        for norm, vector in zip(self.norms.values(), self._vectors):
            norm.data = vector


def fit(
    parameters: list[Tensor],
    loss_of: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    *,
    lr: float,
    weight_decay: float,
    schedule: Schedule,
    warmup: float,
    clip: float | None,
    half: bool,
) -> str | None:
    """Minimise `loss_of(batch)` over the float32 `parameters` with AdamW (torch's betas), one step for each batch.

    The learning rate is `lr` times `rate(...)`; `clip` bounds the norm of all gradients together; `half` scales the
    loss as computing in float16 needs. Stops at the first loss or gradient that is not finite, with the parameters as
    they then are, and returns what it was, in words; otherwise None.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=half)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * rate(schedule, step, len(batches), warmup)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = loss.isfinite() if half else loss.isfinite() & norm.isfinite()  # else the scaler's to mend
        if not bool(finite) or (half and scaler.get_scale() < 1):
            return f"step {step + 1} of {len(batches)}: loss {float(loss.detach()):.3g}, gradient {float(norm):.3g}"
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)
        scaler.update()
    return None


def rate(schedule: Schedule, step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step, counted from 0: a linear rise, then "constant" or "cosine" down to 0.

    The rise takes the share `warmup` of all steps.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2
