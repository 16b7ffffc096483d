"""Singular directions of all weights learn together which of them go first: masks and adapters (ACIP).

Layers compute with left diag(mask) right, of which the factors learn by adapters of low rank and the mask by its price.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.forms.linear import compressed
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.ranked import Ranked
from cluscomp.forms.stored import in_16_bits
from cluscomp.solve import low_rank
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.on_text import train_windows
from cluscomp.train.rounding import RoundedAnew
from cluscomp.train.steps import Steps


class Directions(RoundedAnew[Ranked]):
    """In the place of a ranked weight while it learns: (U + a B A) diag(m) (V + a D C), rounded at the end.

    Each of the R numbers of `mask` begins at `start`. A direction is there whole while its number is above 0, and not
    at all from then on; the gradient is that of the number in units of `start`, straight through. B and D are 0 at
    first, a is `alpha`/`rank`. `scores` (R,) are those until the step before, see `scored`.
    """

    form = Ranked
    mask: nn.Parameter
    left_up: nn.Parameter
    left_down: nn.Parameter
    right_up: nn.Parameter
    right_down: nn.Parameter
    scores: Tensor
    stays: Callable[[], bool]  # whether scores stay as they are; see `Ranking`

    def __init__(
        self,
        left_OR: Float[Tensor, "O R"],
        right_RI: Float[Tensor, "R I"],
        stored: Ranked,
        *,
        start: float,
        rank: int,
        alpha: float,
        seed: int,
    ) -> None:
        """The factors U and V in float32, and as they are stored."""
        super().__init__(stored)
        self._left_OR, self._right_RI = left_OR, right_RI
        self._start, self._scale, self._seed = start, alpha / rank, seed
        (outputs, size), inputs = left_OR.shape, right_RI.shape[1]
        shapes = {"mask": (size,), "left_up": (outputs, rank), "left_down": (rank, size)}
        shapes |= {"right_up": (size, rank), "right_down": (rank, inputs)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(left_OR.new_empty(shape), requires_grad=False))
        self.only_R: Bool[Tensor, " R"] | None = None  # of what is stored, those that are computed with

    def begin(self) -> None:
        """All directions, as they are; what adapters look at is drawn by the seed."""
        self.mask.data.fill_(self._start)
        generator = torch.Generator().manual_seed(self._seed)
        for down, up in ((self.left_down, self.left_up), (self.right_down, self.right_up)):
            drawn = (torch.rand(down.shape, generator=generator) * 2 - 1) / down.shape[1] ** 0.5
            down.data.copy_(drawn)
            up.data.zero_()

    def factors(self) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        """Both factors (O, R) and (R, I) as learned so far, without the mask."""
        left_OR = self._left_OR + self._scale * (self.left_up @ self.left_down)
        return left_OR, self._right_RI + self._scale * (self.right_up @ self.right_down)

    def dense(self) -> Float[Tensor, "O I"]:
        """The weight (O, I) of the directions that are there."""
        left_OR, right_RI = self.factors()
        sizes_R = self.mask.relu()
        there_R = (sizes_R > 0) + (sizes_R - sizes_R.detach()) / self._start
        dense_OI: Tensor = (left_OR * there_R) @ right_RI
        return dense_OI

    def scored(self) -> Float[Tensor, " R"]:
        """The scores (R,) after a step: of what is there its mask's number, -1 of what left in it, of others 1 less.

        So what left earlier scores lower.
        """
        mask_R = self.mask.detach()
        return torch.where(mask_R > 0, mask_R, self.scores.clamp(max=0) - 1)

    def learned(self) -> Ranked:
        """All directions as learned, and their scores; see `RoundedAnew.learned`."""
        left_OR, right_RI = self.factors()
        scores_R = self.scores.clone() if self.stays() else self.scored()
        return Ranked(PlainWeight(in_16_bits(left_OR)), PlainWeight(in_16_bits(right_RI)), scores_R)

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I) in `dtype`: while it learns of what is there, else of `only_R` or all directions."""
        if self._loose or self.only_R is None:
            return super().forward(dtype, inputs)
        dense_OI: Tensor = self.stored.cut(self.only_R)(dtype)
        return dense_OI


class Ranking(Objective):
    """Cross-entropy, and a price on every direction that is there, which rises in each step by a factor.

    Once the directions that are there have a share `until` of the dense matrices' numbers, masks and scores stay, and
    adapters learn alone. Without gradients, where it is scored, the model is cut to that share by what is stored: so
    training is kept if it ranks and repairs better than singular values do.
    """

    scores: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Trained,
        layers: dict[str, Directions],
        ids_BT: Tensor,
        *,
        price: float,
        rise: float,
        until: float,
    ) -> None:
        super().__init__(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids_BT)
        self._layers, self._price, self._rise, self._until = layers, price, rise, until
        self._shapes = {name: (one.out_features, one.in_features) for name, one in layers.items()}
        self._now = 0.0
        sizes = [len(one.mask) for one in layers.values()]
        self.register_buffer("scores", torch.zeros(sum(sizes), device=model.device))  # a killed run goes on from them
        for one, scores_R in zip(layers.values(), self.scores.split(sizes)):
            one.scores, one.stays = scores_R, self.reached

    def reached(self) -> bool:
        """Whether masks stay from here on."""
        return self.share() <= self._until

    def share(self) -> float:
        """The numbers of what is there by the scores, as a share of the dense matrices'."""
        return low_rank.share({name: int((one.scores > 0).sum()) for name, one in self._layers.items()}, self._shapes)

    def begin(self, step: int) -> None:
        """Score what the step before left, and set the price of this one, counted from 0."""
        layers = self._layers.values()
        if step == 0:
            found = [one.stored.scores for one in layers]
        else:
            stayed = self.reached()
            found = [one.scores if stayed else one.scored() for one in layers]
        for one, scores_R in zip(layers, found):
            one.scores.copy_(scores_R)
        stays = self.reached()
        self._now = 0.0 if stays else self._price * self._rise**step
        for one in layers if stays else ():
            one.mask.data.copy_(one.scores)  # what the optimizer's momentum moved since

    def loss(self, input_ids: Tensor, labels: Tensor, of_step: Tensor | int, **batch: Any) -> Tensor:
        """The loss, as `Objective` gives it, and while it learns the batch's part of the price."""
        if not torch.is_grad_enabled():
            with self._cut():
                return super().loss(input_ids, labels, of_step, **batch)
        loss = super().loss(input_ids, labels, of_step, **batch)
        part = (labels != IGNORED).sum() / of_step
        sizes = torch.cat([one.mask for one in self._layers.values()]).relu()
        return loss + self._now * part * sizes.sum()

    @contextmanager
    def _cut(self) -> Iterator[None]:
        scores = {name: one.stored.scores for name, one in self._layers.items()}
        for name, kept_R in low_rank.highest(scores, self._shapes, self._until).items():
            self._layers[name].only_R = kept_R
        try:
            yield
        finally:
            for one in self._layers.values():
                one.only_R = None


def rank_directions(
    model: PreTrainedModel,
    layers: dict[str, Directions],
    train_WT: np.ndarray,
    held_out_WT: np.ndarray,
    settings: Steps,
    *,
    price: float,
    rise: float,
    until: float,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Let a model with ranked weights learn their scores, and their factors by adapters, which are then part of them.

    Args:
        model: the model, all its compressed layers being `Ranked`.
        layers: what stands in their place while they learn, by the layers' names.
        train_WT: windows (W, T) of token ids for all steps, in their order.
        held_out_WT: windows that are scored before and after, at size `until`.
        settings: batches, learning rate and so on.
        price: of a direction, times the number of its mask.
        rise: factor of the price in each step.
        until: the share of the dense matrices' numbers at which masks stay.
        folder: where the state lies that a killed run goes on from.
        seed: of dropout.

    Returns what `train_whole` does, and `open`, the share of the directions that are there at the end.
    """
    places = compressed(model)
    for name, one in layers.items():
        places[name].stored = one
    try:
        trained = Trained(model, codebooks=True, others={})
        train, held_out = torch.from_numpy(train_WT), torch.from_numpy(held_out_WT)
        objective = Ranking(model, trained, layers, held_out[:1], price=price, rise=rise, until=until)
        found = train_windows(
            model, trained, objective, train, held_out, settings,
            name="rank", folder=folder, seed=seed, begin=objective.begin,
        )  # fmt: skip
    finally:
        for name, one in layers.items():
            places[name].stored = one.stored
    there = {name: int((one.stored.scores > 0).sum()) for name, one in layers.items()}
    shapes = {name: (one.out_features, one.in_features) for name, one in layers.items()}
    return {"open": low_rank.share(there, shapes)} | found
