"""Codebooks of the whole model trained on windows of a text: the next token, and what the original predicts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.models.arguments import Layout, hidden_of
from cluscomp.models.opened import Opened
from cluscomp.models.original import Original, blocks, norms
from cluscomp.models.predictions import Teacher, direction
from cluscomp.models.walk import Walk
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.sharding import sharded
from cluscomp.train.steps import Steps
from cluscomp.train.whole import Example, train_whole


def train_on_text(
    model: PreTrainedModel,
    train_WT: np.ndarray,
    held_out_WT: np.ndarray,
    settings: Steps,
    *,
    opened: Opened | None,
    cross_entropy: bool,
    kl: bool,
    teacher: Original | None,
    teacher_top: int,
    hidden: float,
    norms_too: bool,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Train the codebooks of a compressed model in place; returns what `train_whole` does.

    Args:
        model: the compressed model.
        train_WT: windows (W, T) of token ids for all steps, in their order.
        held_out_WT: windows that are scored before and after.
        settings: batches, learning rate and so on.
        opened: what reads the model's blocks, where they are not in memory (train/sharding.py).
        cross_entropy: whether next-token cross-entropy counts.
        kl: whether the teacher's predictions are to be met.
        teacher: the model whose predictions and hidden states are to be met, or None if none is.
        teacher_top: so many of its likeliest tokens are kept, in `folder`.
        hidden: weight of the distance of hidden states, which are then kept, too; 0: none.
        norms_too: whether the weights of norms learn, too.
        folder: where the state lies that a killed run goes on from.
        seed: of dropout.
    """
    train, held_out = torch.from_numpy(train_WT), torch.from_numpy(held_out_WT)
    kept = None
    if teacher is not None:
        kept = Teacher(folder, torch.cat([train, held_out]), teacher_top, hidden=hidden > 0)
        kept.write(Walk(teacher.model(), teacher), batch_size=settings.batch_size)
    weights = {"cross_entropy": cross_entropy, "kl": kl}
    with sharded(model, opened):
        trained = Trained(model, codebooks=True, others=norms(model) if norms_too else {})
        if hidden:
            objective: Objective = WithHidden(model, trained.parameters, hidden=hidden, ids_BT=held_out[:1], **weights)
        else:
            objective = Objective(model, trained.parameters, ids_BT=held_out[:1], **weights)
        return train_windows(
            model, trained, objective, train, held_out, settings, teacher=kept, name="recover", folder=folder, seed=seed
        )


def train_windows(
    model: PreTrainedModel,
    trained: Trained,
    objective: Objective,
    train_WT: Tensor,
    held_out_WT: Tensor,
    settings: Steps,
    *,
    teacher: Teacher | None = None,
    **more: Any,
) -> dict[str, Any]:
    """As `train_whole`, of windows (W, T) in their order, with the teacher's predictions of these and those held out.

    `more`: its name, folder, seed and so on.
    """
    train, held_out = Windows(train_WT, teacher, 0), Windows(held_out_WT, teacher, len(train_WT))
    return train_whole(model, trained, objective, train, held_out, settings, tokens=train_WT.numel(), **more)


class WithHidden(Objective):
    """The losses of `Objective`, and `hidden` times how far the blocks' outputs point from where the teacher's do.

    The squared distance of both as vectors of length 1, summed over all blocks but the last (OneBit, arXiv 2402.11295).
    """

    def __init__(self, *arguments: Any, hidden: float, **weights: Any) -> None:
        super().__init__(*arguments, **weights)
        self.hidden = hidden
        self._between: list[Tensor] = []

    def values(self, ids_BT: Tensor) -> Tensor:
        """As `Objective.values`, (B, T) -> (B, T, H) or logits; what the blocks give on the way is remembered.

        Their own outputs, (B, T, H) each, as the teacher's walk sees them: transformers' `hidden_states` are others for
        some families. The backward pass, which may run a block again, notes nothing.
        """
        (model,) = self._model
        self._between = []

        def note(_block: nn.Module, _args: Any, output: Any) -> None:
            hidden = hidden_of(output)
            layout = Layout.of(hidden, ids_BT.shape) or Layout()
            self._between.append(layout.flat(hidden))

        handles = [block.register_forward_hook(note) for block in blocks(model)[:-1]]
        try:
            return super().values(ids_BT)
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, input_ids: Tensor, labels: Tensor, of_step: Tensor | int, **batch: Any) -> Tensor:
        """As `Objective.loss`, of a batch that also brings the teacher's `hidden` (B, T, blocks - 1, H)."""
        wanted = batch.pop("hidden")
        loss = super().loss(input_ids, labels, of_step, **batch)
        counted = labels != IGNORED
        assert len(self._between) == wanted.shape[2], "a block ran more than once, or not at all"
        off = [
            (direction(hidden_BTH[counted]) - wanted[counted, index].float()).square().sum()
            for index, hidden_BTH in enumerate(self._between)
        ]
        self._between = []
        return loss + self.hidden * torch.stack(off).sum() / of_step


class Windows:
    """Windows (W, T) as training examples, with the teacher's predictions from its window `first` on."""

    def __init__(self, windows_WT: Tensor, teacher: Teacher | None, first: int) -> None:
        self.windows_WT, self.teacher, self.first = windows_WT, teacher, first

    def __len__(self) -> int:
        return len(self.windows_WT)

    def __getitem__(self, index: int) -> Example:
        ids_T = self.windows_WT[index]
        predictions = {} if self.teacher is None else self.teacher.window(self.first + index)
        return {"input_ids": ids_T, "labels": F.pad(ids_T[1:], (0, 1), value=IGNORED)} | predictions
